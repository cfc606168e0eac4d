"""Virtual tokens: PEFT's file, slopes, a federation that learns, and what does not go with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, tiny_run
from peft import PeftModel
from tiny_checkpoints import inputs_of, shaken, write_checkpoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

from spry_app.autodiff.directions import Seed
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.autodiff.slopes import Part
from spry_app.config import AdapterConfig, ModelConfig
from spry_app.errors import SpryError
from spry_app.models import AdaptedModel, load_model, save_adapter
from spry_app.models.prompts import check_prompt
from spry_app.models.units import PROMPT

KINDS = ["prompt", "p-tuning", "prefix"]
HALF = ["prompt", "prefix"]


def _load(folder: str, kind: str, **model: Any) -> AdaptedModel:
    settings = ModelConfig.model_validate({"name": folder, "device": "cpu", **model})
    return load_model(settings, AdapterConfig.model_validate({"kind": kind, "virtual_tokens": 3}), 3, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_virtual_tokens_are_one_unit_of_the_lowest_block_that_changes_logits(checkpoint: str, kind: str) -> None:
    adapted = _load(checkpoint, kind)
    assert list(adapted.units) == [PROMPT, "head"]
    assert adapted.depth(adapted.units[PROMPT]) == 0 and adapted.depth(adapted.units["head"]) == 2
    moved = shaken({name: adapted.tensors()[name] for name in adapted.units[PROMPT]})
    before = adapted.logits({}, inputs_of(adapted))
    assert (adapted.logits(moved, inputs_of(adapted)) - before).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapter_gives_the_same_logits_when_peft_loads_it(tmp_path: Path, checkpoint: str, kind: str) -> None:
    adapted = _load(checkpoint, kind)
    trained = shaken(adapted.tensors())
    save_adapter(adapted, trained, tmp_path)
    fresh = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    with torch.no_grad():
        logits = loaded(**inputs_of(adapted)).logits
    torch.testing.assert_close(logits, adapted.logits(trained, inputs_of(adapted)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", HALF)
def test_a_half_precision_model_takes_them_as_well(checkpoint: str, kind: str) -> None:
    full, half = _load(checkpoint, kind), _load(checkpoint, kind, dtype="bfloat16")
    trained = shaken(full.tensors())
    torch.testing.assert_close(
        half.logits(trained, inputs_of(half)), full.logits(trained, inputs_of(full)), rtol=0.1, atol=0.1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_backprop_is_backprop_or_refused(checkpoint: str, kind: str) -> None:
    adapted = _load(checkpoint, kind)
    inputs, trained = inputs_of(adapted), shaken(adapted.tensors())
    part = Part(lambda params: cross_entropy(adapted.logits(params, inputs), torch.tensor([0, 2])), 1.0)

    def gradient(name: str) -> dict[str, Tensor]:
        return GRADIENTS[name].estimate([part], trained, Seed(0, 0, 0, 0), 1, 1).gradient

    if kind == "prefix":
        with pytest.raises(SpryError, match=r'gradient is "checkpointed-backprop".*adapter\.kind "prefix"'):
            gradient("checkpointed-backprop")
        return
    for name, expected in gradient("backprop").items():
        torch.testing.assert_close(gradient("checkpointed-backprop")[name], expected)


def test_virtual_tokens_are_for_classification(checkpoint: str) -> None:
    adapted = _load(checkpoint, "prompt")
    adapted.model.active_peft_config.task_type = "CAUSAL_LM"
    with pytest.raises(
        SpryError, match=r'adapter\.kind is "prompt".* for tasks of classification; set adapter\.kind to'
    ):
        check_prompt(adapted.model, adapted.tokenizer, "prompt")


def test_a_tokenizer_leaves_room_for_the_virtual_tokens(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("1000000000000000019884624838656", "64"))
    assert _load(folder, "prompt").tokenizer.model_max_length == 61


@pytest.mark.parametrize(
    ("kind", "method"), [("prompt", "spry"), ("p-tuning", "spry-per-iteration"), ("prefix", "spry-per-iteration")]
)
def test_two_rounds_of_a_federation_learn(tmp_path: Path, kind: str, method: str) -> None:
    """With the head dealt to some clients alone, who would begin above all blocks if they could."""
    keys: dict[str, Any] = {"adapter.kind": kind, "client.local-steps": 8, "client.directions": 4, "method": method}
    keys |= {"client.micro-batch": 0, "client.learning-rate": 0.1, "server.optimizer": "average", "head": "split"}
    keys |= {"adapter.virtual-tokens": 4}
    federation = Federation(tmp_path, tiny_run(tmp_path) | keys)
    before = federation.strategy.snapshot()
    federation.start(3)
    first, last = federation.recorder.rounds[1:]
    assert not last.reasons and last.train_loss < first.train_loss
    moved = [name for name, tensor in federation.strategy.snapshot().items() if not torch.equal(tensor, before[name])]
    assert any(name in federation.adapted.units[PROMPT] for name in moved)


def test_a_method_that_cuts_passes_is_refused_by_a_sentence(tmp_path: Path) -> None:
    keys = {"adapter.kind": "prompt", "method": "fedspzo", "client.cut": 1}
    federation = Federation(tmp_path, tiny_run(tmp_path) | keys)
    with pytest.raises(
        SpryError, match=r"cannot be cut at block 1 \(virtual tokens stand before a text\): set .* or method"
    ):
        federation.start(2, rounds=1)
