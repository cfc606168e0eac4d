"""The depth of a unit, from names alone: for real models of each family, and for shapes that they do not cover."""

import pytest
from peft import LoraConfig, get_peft_model
from tiny_models import MODELS, SHARED, tiny_model
from transformers import AlbertConfig, AlbertForSequenceClassification

from spry_app.models.units import depths, group


@pytest.mark.parametrize("family", MODELS)
def test_query_and_value_of_two_blocks_lie_at_0_and_1_and_the_head_above(family: str) -> None:
    found, blocks = depths(group(tiny_model(family)))
    assert blocks == 2
    assert list(found.values()) == [0, 0, 1, 1, 2]
    assert found["head"] == 2


def test_layers_that_share_their_weights_are_one_block() -> None:
    config = AlbertConfig(
        embedding_size=8, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=32, **SHARED
    )
    lora = LoraConfig(task_type="SEQ_CLS", r=1, target_modules=["query", "value"])
    found, blocks = depths(group(get_peft_model(AlbertForSequenceClassification(config), lora)))
    assert blocks == 1
    assert list(found.values()) == [0, 0, 1]


@pytest.mark.parametrize(
    ("units", "blocks"),
    [
        ({"embeddings.biases": 0, "layer.0.q": 0, "layer.1.q": 1, "pooler.biases": 2, "head": 2}, 2),
        ({"h.10.attn": 10, "h.11.attn": 11, "head": 12}, 12),
        ({"encoder.block.0.layer.1.q": 0, "encoder.block.1.layer.0.q": 1, "decoder.block.0.layer.2.q": 2}, 3),
        ({"layers.0.mlp.experts.7.up": 0, "layers.1.mlp.experts.3.up": 1}, 2),
        ({"head": 0}, 0),
        ({}, 0),
    ],
)
def test_names_alone_tell_the_depth(units: dict[str, int], blocks: int) -> None:
    assert depths(units) == (units, blocks)
