"""How many tokens a model has places for: as many as it bears, and no more."""

from pathlib import Path

import pytest
import torch
from questions import answering_run
from rows import write
from tiny_models import ALL_MODELS, PAD, tiny_base

from spry_app.client.node import load_node
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.models.positions import positions


@pytest.mark.parametrize("family", ALL_MODELS)
def test_a_model_bears_as_many_tokens_as_it_has_places_for(family: str) -> None:
    model = tiny_base(family)
    most = positions(model)

    def run(length: int) -> None:
        ids = torch.full((1, length), PAD + 1)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))

    run(most or 200)
    if most is not None:
        with pytest.raises((IndexError, RuntimeError)):
            run(most + 1)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_rows_for_which_a_model_has_no_places_are_refused(tmp_path: Path, family: str) -> None:
    run_config = answering_run(tmp_path, family) | {"data.max-length": 30}
    most = {"bert": 64, "roberta": 62}[family]
    node = {"partition-id": 0, "num-partitions": 2}
    assert load_node(RunConfig.from_flower(run_config), node)
    row = {"question": "w5", "context": "w90 " * 70, "answers": {"text": ["w90"], "answer_start": [0]}}
    long = write(tmp_path / "long.jsonl", [row] * 20)
    sentence = (
        rf"have up to 7[45] tokens, and this {family} model has places for {most}: lower data\.max-length to {most}"
    )
    with pytest.raises(SpryError, match=sentence):
        load_node(RunConfig.from_flower(run_config | {"data.max-length": 100, "data.source": long}), node)
