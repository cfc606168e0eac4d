"""Replies that come after their round: used once, as a change from where they started, scaled down; or lost."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, LocalGrid, same, tiny_run
from flwr.app import ArrayRecord, Message

from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import METHODS, get_method
from spry_app.protocol import from_arrays
from spry_app.report import render

NODES = (100, 107, 114)
SLOW = 107
DISCOUNT = {"server.late-replies": "discount", "server.late-discount": 0.5}


class Late(LocalGrid):
    """Flower's Grid with replies that come late. comes: (node, round) -> the round in which its reply comes."""

    def __init__(self, run_config: dict[str, Any], comes: dict[tuple[int, int], float], again: bool = False) -> None:
        super().__init__(len(NODES), run_config)
        self.comes, self.again, self.round = comes, again, 0
        self.sent: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        self._held: list[tuple[float, Message]] = []

    def _deliver(self, message: Message) -> Message | None:
        reply = super()._deliver(message)
        if reply is None or message.metadata.message_type != "train":
            return reply
        self.round = int(message.metadata.group_id)
        key = message.metadata.dst_node_id, self.round
        self.sent[key] = from_arrays(reply.content["arrays"])
        if key not in self.comes:
            return reply
        self._held.append((self.comes[key], self.spoil(reply)))
        return None

    def spoil(self, reply: Message) -> Message:
        return reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = set(message_ids)
        assert ids
        found = [(at, r) for at, r in self._held if at <= self.round and r.metadata.reply_to_message_id in ids]
        if not self.again:
            self._held = [held for held in self._held if held not in found]
        return [reply for _, reply in found] * (2 if self.again else 1)


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    keys = {"method": "fedavg", "server.optimizer": "average", "server.fraction-evaluate": 0.0}
    return tiny_run(tmp_path_factory.mktemp("tiny")) | keys | {"num-server-rounds": 100}


def after_rounds(federation: Federation, grid: Late, rounds: int) -> list[dict[str, torch.Tensor]]:
    """The tensors before all rounds and after each."""
    strategy = federation.strategy
    found, aggregate = [strategy.snapshot()], strategy.aggregate_train

    def watch(*arguments: Any) -> Any:
        result = aggregate(*arguments)
        found.append(strategy.snapshot())
        return result

    strategy.aggregate_train = watch  # type: ignore[method-assign]
    federation.run(grid, rounds)
    return found


@pytest.mark.parametrize("rounds_late", [1, 2])
def test_a_late_change_is_from_where_it_started_and_scaled_down_for_each_round(
    rounds_late: int, run_config: dict, tmp_path: Path
) -> None:
    """By hand: w - (change of one + change of the other + 0.5^rounds * late change) / 3, as all have 16 examples."""
    federation = Federation(tmp_path, run_config | DISCOUNT)
    grid = Late(run_config, {(SLOW, 1): 1 + rounds_late})
    w = after_rounds(federation, grid, rounds_late + 2)
    start, last = w[0], rounds_late + 1
    for name, value in w[last - 1].items():
        changes = [value - grid.sent[node, last][name] for node in NODES if node != SLOW]
        changes.append(0.5**rounds_late * (start[name] - grid.sent[SLOW, 1][name]))
        torch.testing.assert_close(w[last][name], value - sum(changes) / 3, rtol=1e-5, atol=1e-7)
        plain = (grid.sent[100, 1][name] + grid.sent[114, 1][name]) / 2
        torch.testing.assert_close(w[1][name], plain)
    lines = federation.recorder.rounds[1:]
    assert [line.asked for line in lines] == [3] + [2] * rounds_late + [3]  # nothing else meanwhile
    assert [line.answered for line in lines] == [2] + [2] * rounds_late + [3]
    assert [line.late for line in lines] == [[]] * rounds_late + [["node 107: its reply to round 1"], []]
    assert lines[0].reasons == ["node 107: no answer within server.round-timeout-s (600 s)"]
    assert "1 replies came after their round and were used in a later one, with server.late-discount=0.5." in render(
        [tmp_path]
    )


def test_a_late_gradient_is_scaled_down(run_config: dict, tmp_path: Path) -> None:
    keys = {"method": "fedsgd", "server.optimizer": "sgd", "server.learning-rate": 0.5}
    federation = Federation(tmp_path, run_config | keys | DISCOUNT | {"server.head-learning-rate": 0.0})
    grid = Late(federation.run_config, {(SLOW, 1): 2})
    w = after_rounds(federation, grid, 2)
    for name, value in w[1].items():
        mean = (grid.sent[100, 2][name] + grid.sent[114, 2][name] + 0.5 * grid.sent[SLOW, 1][name]) / 3
        torch.testing.assert_close(w[2][name], value - 0.5 * mean, rtol=1e-5, atol=1e-7)


def test_it_is_used_once_though_it_comes_again(run_config: dict, tmp_path: Path) -> None:
    results = []
    for again in (False, True):
        federation = Federation(tmp_path / str(again), run_config | DISCOUNT)
        federation.run(Late(run_config, {(SLOW, 1): 2}, again), 4)  # type: ignore[arg-type]
        results.append(federation.strategy.snapshot())
        assert [len(line.late) for line in federation.recorder.rounds[1:]] == [0, 1, 0, 0]
    assert same(*results)
    assert "it answered before" in federation.recorder.rounds[2].reasons[0]


def test_dropped_ones_are_as_if_they_had_never_come(run_config: dict, tmp_path: Path) -> None:
    results = []
    for comes in (2.0, math.inf):
        federation = Federation(tmp_path / str(comes), run_config)
        federation.run(Late(run_config, {(SLOW, 1): comes}), 3)  # type: ignore[arg-type]
        results.append(federation.strategy.snapshot())
        assert [line.asked for line in federation.recorder.rounds[1:]] == [3, 3, 3]
        assert not any(line.late for line in federation.recorder.rounds)
    assert same(*results)


def test_a_late_reply_is_checked_like_any_other(run_config: dict, tmp_path: Path) -> None:
    class Spoiled(Late):
        def spoil(self, reply: Message) -> Message:
            tensors = from_arrays(reply.content["arrays"])
            first = next(iter(tensors))
            reply.content["arrays"] = ArrayRecord(tensors | {first: torch.full_like(tensors[first], math.nan)})
            return reply

    class Forged(Late):
        def spoil(self, reply: Message) -> Message:
            reply.metadata.__dict__["_src_node_id"] = 100
            return reply

    results = []
    for kind, reason in ((Spoiled, "not finite"), (Forged, "in whose place it answers"), (Late, "")):
        federation = Federation(tmp_path / kind.__name__, run_config | DISCOUNT)
        federation.run(kind(run_config, {(SLOW, 1): 2.0 if reason else math.inf}), 2)  # type: ignore[arg-type]
        results.append(federation.strategy.snapshot())
        line = federation.recorder.rounds[-1]
        assert (line.late, line.refused) == ([], int(bool(reason)))
        assert not reason or reason in line.reasons[0]
    assert same(results[0], results[1]) and same(results[1], results[2])


def test_a_node_that_never_answers_is_asked_again_after_as_long_again(run_config: dict, tmp_path: Path) -> None:
    """A round takes 200 s on this clock, and the first one 600."""
    federation = Federation(tmp_path, run_config | DISCOUNT)
    federation.strategy.late.clock = lambda: 600.0 + 200.0 * (federation.recorder.current.round - 1)
    federation.run(Late(run_config, {(SLOW, 1): math.inf}), 6)  # type: ignore[arg-type]
    assert [line.asked for line in federation.recorder.rounds[1:]] == [3, 2, 2, 2, 3, 3]


def test_where_everyone_is_late_all_are_asked_again(run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config | DISCOUNT)
    federation.run(Late(run_config, {(node, 1): 2.0 for node in NODES}), 2)  # type: ignore[arg-type]
    assert [(line.asked, line.answered, len(line.late)) for line in federation.recorder.rounds[1:]] == [
        (3, 0, 0),
        (3, 3, 3),
    ]


@pytest.mark.parametrize("method", METHODS)
def test_replies_that_are_repeated_or_accounted_for_cannot_be_late(method: str) -> None:
    keys = {"method": method, "server.late-replies": "discount"}
    if METHODS[method].reply == "slopes":
        with pytest.raises(SpryError, match=r"server\.late-replies='discount': clients of method=.* reply with slopes"):
            get_method(RunConfig.from_flower(keys))
        return
    get_method(RunConfig.from_flower(keys))
    with pytest.raises(SpryError, match=r"server\.late-replies='discount': with privacy\.mode='central'"):
        get_method(RunConfig.from_flower(keys | {"privacy.mode": "central"}))
