"""Question answering with tiny models: slopes, micro-batches, a federation, an adapter that PEFT loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation
from peft import PeftModel
from questions import answering_run
from tiny_checkpoints import shaken
from tiny_models import slopes_by_backprop, some_directions
from transformers import AutoModelForQuestionAnswering

from spry_app.autodiff.directions import Seed
from spry_app.autodiff.slopes import forward_mode
from spry_app.client.node import Node, load_node
from spry_app.config import RunConfig
from spry_app.models import save_adapter
from spry_app.objectives import batch_of, objective, score

SEED = Seed(1, 2, 3, 4)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def run_config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return answering_run(tmp_path_factory.mktemp("answering"), request.param)


def _node(run_config: dict[str, Any]) -> Node:
    return load_node(RunConfig.from_flower(run_config), {"partition-id": 0, "num-partitions": 2})


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_slope_of_the_loss_is_backprops(run_config: dict[str, Any], at_once: int) -> None:
    node = _node(run_config)
    params = shaken(node.adapted.tensors())
    directions = some_directions(params, 3)
    batch = batch_of(node.adapted, node.train, range(6), 4, SEED)
    _, slopes = forward_mode(batch, params, directions, at_once)
    truth = slopes_by_backprop(objective(node.adapted, node.train, range(6), SEED), params, directions)
    assert slopes == pytest.approx(truth, rel=1e-3, abs=1e-5) and min(map(abs, truth)) > 1e-3


def test_a_loss_is_the_same_however_its_windows_are_cut_into_micro_batches(run_config: dict[str, Any]) -> None:
    """Windows differ in length, so that they are padded unlike; the softmax over a window leaves padding out."""
    node = _node(run_config)
    params, rows = node.adapted.tensors(), range(8)
    assert len({node.train.length(row) for row in rows}) > 1
    whole, *cut = (
        sum(part.weight * part.objective(params) for part in batch_of(node.adapted, node.train, rows, size, SEED))
        for size in (0, 1, 3)
    )
    for other in cut:
        torch.testing.assert_close(other, whole, rtol=1e-5, atol=1e-5)


def test_a_score_is_the_same_however_many_windows_pass_at_once(run_config: dict[str, Any]) -> None:
    node = _node(run_config)
    node.adapted.load_tensors(shaken(node.adapted.tensors()))
    one, other = (score(node.adapted, node.heldout, size) for size in (1, 100))
    assert one.numbers() == pytest.approx(other.numbers(), rel=1e-4)
    assert one.sums["questions"] < one.examples == len(node.heldout)


@pytest.mark.parametrize("method", ["spry", "spry-per-iteration", "fedavg"])
def test_a_federation_learns_and_writes_down_the_scores(tmp_path: Path, method: str) -> None:
    keys = {"method": method, "client.local-steps": 8, "client.directions": 4, "client.learning-rate": 0.2}
    federation = Federation(tmp_path, answering_run(tmp_path) | keys)
    federation.start(3)
    _, first, last = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert last["main-metric"] == "f1" and last["accuracy"] is None and last["refused"] == 0
    assert {"exact", "f1", "answerable-f1", "unanswerable-exact"} <= last["metrics"].keys()
    assert all(0 <= value <= 1 for value in last["metrics"].values())
    assert last["train-loss"] < first["train-loss"] and last["loss"] > 0


def test_a_saved_adapter_gives_the_same_logits_when_peft_loads_it(tmp_path: Path, run_config: dict[str, Any]) -> None:
    adapted = _node(run_config).adapted
    trained = shaken(adapted.tensors())
    save_adapter(adapted, trained, tmp_path)
    fresh = AutoModelForQuestionAnswering.from_pretrained(run_config["model.name"], num_labels=2)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    inputs = dict(adapted.tokenizer(["w5 w7", "w8"], ["w9 w20 w21", "w30 w31"], padding=True, return_tensors="pt"))
    with torch.no_grad():
        out = loaded(**inputs)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "QUESTION_ANS"
    logits = torch.stack([out.start_logits, out.end_logits], -1)
    torch.testing.assert_close(logits, adapted.logits(trained, inputs), rtol=1e-5, atol=1e-5)
