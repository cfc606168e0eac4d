"""Replies that cannot be used are refused, counted and left out; the round goes on without them."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, same, tiny_run
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from benchmarks.local_grid import LocalGrid
from spry_app.errors import SpryError
from spry_app.protocol import MOST_EXAMPLES, Score, TrainReply, to_arrays
from spry_app.server.checks import Asked, problem

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
        elif how == "another":
            reply.metadata.__dict__["_src_node_id"] = 107  # of partition 1
        elif how == "weighty":
            reply.content["metrics"]["num-examples"] = 2**62
        elif how == "words":
            del reply.content["metrics"]
            reply.content["metrics"] = ConfigRecord({"slopes": ["a", "b"]})
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
        ("impossible score", "an impossible score: correct 4 of 3"),
        ("empty score", "measurements are impossible"),
        ("no metrics", "slopes in the metrics is"),
        ("no arrays", "arrays are missing"),
        ("stranger", "it was not asked"),
        ("another", "node 100 was, in whose place it answers"),
        ("weighty", "it was trained on 4611686018427387904 examples; it can be 1 to 16"),
        ("words", "a list of something else than float"),
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


ASKED = Asked({"a": torch.zeros(2)}, steps=1, slopes=2, passes=3.0, examples=8, score=False)
SOUND = TrainReply({"a": torch.ones(2)}, ((1.0, 2.0),), loss=0.5, examples=8, seconds=1.0, forwards=24.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"examples": 9}, "it can be 1 to 8"),
        ({"examples": 0}, "it can be 1 to 8"),
        ({"loss": 1e300}, "its loss is"),
        ({"seconds": -1.0}, "measurements are impossible"),
        ({"peak_mib": -1.0}, "measurements are impossible"),
        ({"seconds": math.inf}, "measurements are impossible"),
        ({"personal": Score(1.0, {"correct": 1}, 2)}, "measurements are impossible"),
        ({"slopes": ((1.0, -1e13),)}, "a slope is beyond 1e+12"),
        ({"slopes": ((1.0, 2.0), (1.0, 2.0))}, "2 steps of 2 slopes; asked for were 1 steps of 2"),
        ({"slopes": ()}, "0 steps of 0 slopes"),
        ({"tensors": {"a": torch.tensor([1.0, -1e13])}}, "a has a number beyond 1e+12"),
        ({"tensors": {"a": torch.ones(1)}}, "a is (1,)"),
        ({"tensors": {"a": torch.ones(2), **{f"x{n}": torch.ones(1) for n in range(999)}}}, "and 995 more"),
    ],
)
def test_numbers_that_overflow_or_outweigh_the_others_are_refused(change: dict, reason: str) -> None:
    found = problem(dataclasses.replace(SOUND, **change), ASKED)
    assert reason in found if reason else not found
    assert len(found) < 300


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(("steps", "asked"), [(0, 0), (-1, -1), (1, 0), (2, 3), (1, MOST_EXAMPLES + 1)])
def test_in_whole_epochs_the_steps_are_at_least_a_number(steps: int, asked: int, partial: bool) -> None:
    """Nobody but the node knows how many there are, and shares of examples are counted by them."""
    epochs = dataclasses.replace(ASKED, steps=0, slopes=0, examples=MOST_EXAMPLES, partial=partial)
    reply = dataclasses.replace(SOUND, slopes=(), steps=steps, steps_asked=asked)
    if partial and (steps, asked) == (2, 3):
        assert not problem(reply, epochs)
    else:
        assert f"it did {steps} of {asked} local steps" in problem(reply, epochs)


def test_what_a_node_says_cannot_forge_a_line_of_the_log_or_fill_it(run_config: dict, tmp_path: Path) -> None:
    def spoil(partition: int, reply: Message) -> Message:
        if partition == 0:
            words = "no\x1b[2J\nINFO : round 1/1  accuracy 1.0" + "!" * 10**6
            reply.content = RecordDict({"refusal": ConfigRecord({"reason": words})})
        return reply

    federation = Federation(tmp_path, run_config)
    federation.start(CLIENTS, rounds=1, tamper=spoil)
    (reason,) = federation.recorder.rounds[-1].reasons
    assert reason.startswith("node 100: no [2J INFO : round 1/1")
    assert reason.isprintable()
    assert len(reason) < 1100


def test_only_those_who_were_asked_score_the_model_and_only_once(run_config: dict, tmp_path: Path) -> None:
    """Or one node could make the accuracy that ends a run (stop.target-accuracy)."""
    federation = Federation(tmp_path, run_config | {"server.fraction-evaluate": 0.34, "server.evaluate-every": 1})
    strategy, grid = federation.strategy, LocalGrid(CLIENTS, run_config)
    strategy.recorder.begin(1)
    messages = strategy.configure_evaluate(1, to_arrays(strategy.snapshot()), None, grid)  # type: ignore
    (reply,) = grid.send_and_receive(messages)
    stranger = Score(0.0, {"correct": 10**6}, 10**6).to_message(messages[0])
    stranger.metadata.__dict__["_src_node_id"] = 99
    strategy.aggregate_evaluate(1, [stranger, reply, reply, Score(0.0, {"correct": 9}, 9).to_message(messages[0])])
    assert strategy.recorder.score == Score.from_message(reply, {"correct": (0, 1)})
    assert strategy.recorder.current.refused == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fingerprint": "f" * 64}, "not the server's"),
        ({"fingerprint": "f" * 10**6}, "more than 256 characters"),
        ({"examples": -1}, "impossible rows"),
        ({"heldout": 2**62}, "impossible rows"),
        ({"partition": "0"}, "partition in the introduction is '0', not of type int"),
    ],
)
def test_a_node_that_introduces_itself_badly_is_not_used(
    change: dict, reason: str, run_config: dict, tmp_path: Path
) -> None:
    federation = Federation(tmp_path, run_config | {"server.min-available-nodes": 3})

    class Grid(LocalGrid):
        def send_and_receive(self, messages: Any, timeout: float | None = None) -> Any:
            *others, first = super().send_and_receive(messages, timeout)
            first.content["introduction"].update(change)
            return [*others, first]

    with pytest.raises(SpryError, match=f"2 of 3 connected nodes can be used.*{reason}"):
        federation.strategy.fleet.available(Grid(CLIENTS, run_config))
