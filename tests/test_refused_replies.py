"""Replies that cannot be used are refused, counted and left out; the round goes on without them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, same, tiny_run
from flwr.app import ArrayRecord, Message, MetricRecord

from spry_app.errors import SpryError

CLIENTS = 3


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_run(tmp_path_factory.mktemp("tiny"))


def breaking(how: str) -> Any:
    """A tamper function that spoils the reply of partition 0."""

    def spoil(partition: int, reply: Message) -> Message | None:
        if partition != 0:
            return reply
        arrays = reply.content["arrays"]
        tensors = dict(arrays.to_torch_state_dict())
        first = next(iter(tensors))
        if how == "lost":
            return None
        if how == "nan":
            tensors[first] = torch.full_like(tensors[first], math.nan)
        elif how == "missing":
            del tensors[first]
        elif how == "misshapen":
            tensors[first] = tensors[first].flatten()[:-1]
        elif how == "extra":
            tensors["not.yours"] = torch.zeros(1)
        elif how == "half":
            tensors[first] = tensors[first].half()
        elif how == "nan loss":
            reply.content["metrics"]["train-loss"] = math.nan
        elif how.startswith("forwards "):
            reply.content["metrics"]["forwards"] = float(how.removeprefix("forwards "))
        elif how == "impossible score":
            reply.content["metrics"].update({"loss": 1.0, "correct": 4, "heldout": 3})
        elif how == "empty score":
            reply.content["metrics"].update({"loss": 0.0, "correct": 0, "heldout": 0})
        elif how == "no metrics":
            reply.content["metrics"] = MetricRecord({})
        elif how == "no arrays":
            del reply.content["arrays"]
            return reply
        elif how == "stranger":
            reply.metadata.__dict__["_src_node_id"] = 99
        reply.content["arrays"] = ArrayRecord(tensors)
        return reply

    return spoil


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("nan", "not finite"),
        ("missing", "tensors missing"),
        ("misshapen", "is ("),
        ("extra", "not asked for: ['not.yours']"),
        ("half", "float16"),
        ("nan loss", "loss is nan"),
        ("forwards nan", "cannot have taken nan forward passes"),
        ("forwards -1", "cannot have taken -1.0 forward passes"),
        ("forwards 1e9", "cannot have taken 1000000000.0 forward passes"),
        ("impossible score", "an impossible score: 4 of 3"),
        ("empty score", "measurements are impossible"),
        ("no metrics", "slopes in the metrics is"),
        ("no arrays", "arrays are missing"),
        ("stranger", "it was not asked"),
    ],
)
def test_a_bad_reply_is_refused_and_counted_and_the_round_goes_on(
    how: str, reason: str, run_config: dict, tmp_path: Path
) -> None:
    broken, lost = Federation(tmp_path / "broken", run_config), Federation(tmp_path / "lost", run_config)
    broken.start(CLIENTS, rounds=1, tamper=breaking(how))
    lost.start(CLIENTS, rounds=1, tamper=breaking("lost"))
    line = broken.recorder.rounds[-1]
    assert (line.asked, line.answered, line.refused) == (CLIENTS, CLIENTS - 1, 1)
    assert reason in line.reasons[0]
    assert same(broken.strategy.snapshot(), lost.strategy.snapshot())


@pytest.mark.parametrize("slopes", [[1.0], [1.0, math.inf, 1.0, 1.0], [1.0] * 6])
def test_bad_scalars_are_refused(slopes: list[float], run_config: dict, tmp_path: Path) -> None:
    def spoil(partition: int, reply: Message) -> Message:
        if partition == 0:
            reply.content["metrics"]["slopes"] = slopes
        return reply

    federation = Federation(tmp_path, run_config | {"method": "spry-per-iteration"})
    federation.start(CLIENTS, rounds=1, tamper=spoil)
    assert federation.recorder.rounds[-1].refused == 1


def test_three_rounds_without_a_usable_reply_end_the_run(run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config | {"num-server-rounds": 9})
    with pytest.raises(SpryError, match="No usable reply in 3 rounds"):
        federation.start(CLIENTS, tamper=lambda partition, reply: None)
