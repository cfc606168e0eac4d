"""Nodes that fail, fall silent or come late: each is named with its reason, and has its place again when it is back."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from federation import Federation, LocalGrid, tiny_run
from flwr.app import Error, Message

from spry_app.errors import SpryError

LOST = 107
"""Id of LocalGrid's second node."""


class Losing(LocalGrid):
    """The second node is gone for so many messages: Flower answers in its place, as the SuperLink, or nobody does."""

    def __init__(self, run_config: dict[str, Any], kind: str, times: int, silent: bool = False) -> None:
        super().__init__(3, run_config)
        self.kind, self.times, self.silent = kind, times, silent

    def _deliver(self, message: Message) -> Message | None:
        at, kind = message.metadata.dst_node_id, message.metadata.message_type
        if at != LOST or kind != self.kind or not self.times:
            return super()._deliver(message)
        self.times -= 1
        if self.silent:
            return None
        message.metadata.__dict__["_message_id"] = f"lost-{self.times}"
        reply = Message(Error(5, "Node Unavailable"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 1
        return reply


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    keys = {"method": "spry-per-iteration", "server.min-available-nodes": 3, "num-server-rounds": 3}
    return tiny_run(tmp_path_factory.mktemp("tiny")) | keys


def start(run_config: dict[str, Any], folder: Path, grid: LocalGrid) -> Federation:
    federation = Federation(folder, run_config)
    federation.run(grid, 3)
    return federation


def test_a_node_that_is_gone_is_named_and_learns_all_when_it_is_back(run_config: dict, tmp_path: Path) -> None:
    """It comes back without what it held, as a process that was started again does."""
    grid = Losing(run_config, "train", 1)
    federation = start(run_config, tmp_path, grid)
    _, first, second, third = federation.recorder.rounds
    assert first.reasons == [f"node {LOST}: Node Unavailable"]
    assert (first.asked, first.answered, first.refused) == (3, 2, 1)
    assert (second.answered, third.answered) == (3, 3)


def test_a_node_that_stays_silent_is_named(run_config: dict, tmp_path: Path) -> None:
    federation = start(run_config, tmp_path, Losing(run_config, "train", 1, silent=True))
    _, first, second, _ = federation.recorder.rounds
    assert first.reasons == [f"node {LOST}: no answer within server.round-timeout-s (600 s)"]
    assert (first.asked, first.answered, first.refused) == (3, 2, 0)
    assert second.answered == 3


def test_clients_that_do_not_score_are_named(run_config: dict, tmp_path: Path) -> None:
    keys = {"num-server-rounds": 3, "server.evaluate-every": 9}
    federation = start(run_config | keys, tmp_path, Losing(run_config, "evaluate", 1, silent=True))
    assert federation.recorder.rounds[-1].reasons == [f"node {LOST}: no answer within server.round-timeout-s (600 s)"]


@pytest.mark.parametrize("silent", [False, True])
def test_a_node_that_fails_when_it_loads_is_asked_again(silent: bool, run_config: dict, tmp_path: Path) -> None:
    federation = start(run_config, tmp_path, Losing(run_config, "query.introduce", 2, silent))
    assert [line.answered for line in federation.recorder.rounds[1:]] == [3, 3, 3]


def test_a_node_that_always_fails_is_left_out(run_config: dict, tmp_path: Path) -> None:
    grid = Losing(run_config, "query.introduce", 9)
    with pytest.raises(SpryError, match=r"2 of 3 connected nodes can be used.*1 said: Node Unavailable"):
        start(run_config, tmp_path / "strict", grid)
    assert grid.times == 9 - 3
    grid = Losing(run_config, "query.introduce", 9)
    federation = start(run_config | {"server.min-available-nodes": 2}, tmp_path / "run", grid)
    assert [line.answered for line in federation.recorder.rounds[1:]] == [2, 2, 2]
    assert grid.times == 9 - 3


def test_a_node_that_comes_late_takes_part_from_then_on(run_config: dict, tmp_path: Path) -> None:
    class Late(LocalGrid):
        def get_node_ids(self) -> Iterable[int]:
            first_rounds = len(federation.recorder.rounds) < 2
            return [node for node in self.contexts if node != LOST or not first_rounds]

    federation = Federation(tmp_path, run_config | {"server.min-available-nodes": 2})
    federation.run(Late(3, run_config), 3)
    assert [line.answered for line in federation.recorder.rounds[1:]] == [2, 3, 3]
    assert not [line.reasons for line in federation.recorder.rounds if line.reasons]
