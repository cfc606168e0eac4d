"""Whatever bytes come, they are used or refused in words: nothing else leaves the decoders, the model does not change
by what was refused, and nothing is allocated because a message says so. SPRY_FUZZ=100000 runs that many.
"""

import collections
import dataclasses
import logging
import os
import random
import resource
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from bad_messages import NoMessage, bad, copied, damaged
from federation import Federation, tiny_run
from flwr.app import Message, RecordDict
from flwr.common.serde import context_to_proto, message_to_proto
from test_worker_wire import received

from benchmarks.local_grid import LocalGrid
from spry_app.client.answer import check_task
from spry_app.client.catch_up import tensors_of
from spry_app.client.node import Node, load_node
from spry_app.errors import SpryError
from spry_app.protocol import Task, expected_fingerprint, frame_in, to_arrays
from spry_app.server.fleet import Fleet
from spry_app.server.letters import Letters
from spry_app.worker.jobs import Jobs
from spry_app.worker.wire import send

CLIENTS = 3
MESSAGES = int(os.environ.get("SPRY_FUZZ", "3000"))
"""Of all tests in this file together."""
MOST_S = 1.0
"""Of the processor, for one message."""
MOST_BYTES = 1 << 30
"""That all of them together may add to what this process has at the start."""


class Exchange(LocalGrid):
    """Keeps what was sent and answered."""

    sent: list[Message]
    answered: list[Message]

    def send_and_receive(self, messages: Iterable[Message], timeout: float | None = None) -> list[Message]:
        self.sent = list(messages)
        self.answered = list(super().send_and_receive(self.sent, timeout))
        return self.answered


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    keys = {"server.evaluate-every": 1, "client.batch-size": 4, "client.local-steps": 1}
    return tiny_run(tmp_path_factory.mktemp("tiny")) | keys


@contextmanager
def bounded(what: Any) -> Iterator[None]:
    """Within it, no more time than one message may take."""
    started = time.thread_time()
    yield
    assert time.thread_time() - started < MOST_S, what


@pytest.fixture(autouse=True, scope="module")
def little_room() -> Iterator[None]:
    """Who asks for much memory in this file gets a MemoryError, which no decoder may let out, or ask for."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MOST_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(autouse=True, scope="module")
def silence() -> Iterator[None]:
    """A line a refusal is a hundred thousand lines."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


def numbers(part: float) -> range:
    return range(round(part * MESSAGES))


def each_bad(honest: Sequence[Message], part: float) -> Iterator[tuple[int, list[Message]]]:
    """Those that Flower can read, with their numbers."""
    for number in numbers(part):
        try:
            yield number, bad(honest, number)
        except NoMessage:
            continue


def first_round(federation: Federation) -> Exchange:
    """Its training messages, answered but not averaged."""
    grid = Exchange(CLIENTS, federation.run_config)
    messages = federation.strategy.configure_train(1, to_arrays(federation.strategy.snapshot()), None, grid)  # type: ignore
    grid.send_and_receive(messages)
    return grid


@pytest.mark.parametrize("method", ["spry", "spry-per-iteration"])
def test_no_reply_breaks_a_round_and_none_that_is_refused_changes_the_model(
    method: str, run_config: dict, tmp_path: Path
) -> None:
    """One that is used changes nothing but the units that its node was given, and leaves finite numbers."""
    federation = Federation(tmp_path, run_config | {"method": method})
    strategy, grid, start = federation.strategy, first_round(federation), federation.strategy.snapshot()
    found = collections.Counter[str]()
    for number, messages in each_bad(grid.answered, 0.3):
        strategy.letters, strategy.barren_rounds = Letters(grid.sent), 0
        strategy.recorder.begin(1)
        with bounded(f"message {number}"):
            strategy.aggregate_train(1, messages)
        now, line = strategy.snapshot(), strategy.recorder.current
        assert all(len(reason) < 1100 and reason.isprintable() for reason in line.reasons)
        assert line.answered + line.refused == len(messages)
        moved = {name for name, value in now.items() if not torch.equal(value, start[name])}
        own = set().union(*(strategy.asked(strategy.tasks[node_of(each, grid)]) for each in messages))
        assert moved <= own if line.answered else not moved, f"message {number}"
        assert all(torch.isfinite(value).all() for value in now.values()), f"message {number}"
        strategy.state.load(0, start, {})
        found["used" if line.answered else line.reasons[0].split(": ")[1][:24]] += 1
    assert found["used"] and len(found) > 8, found  # the honest ones among them; and many ways to be wrong
    print(method, found.most_common(40))


def node_of(message: Message, grid: Exchange) -> int:
    """Whom the message was asked of that this one answers; else anybody."""
    nodes = {sent.metadata.message_id: sent.metadata.dst_node_id for sent in grid.sent}
    return nodes.get(message.metadata.reply_to_message_id, grid.sent[0].metadata.dst_node_id)


def test_no_score_breaks_an_evaluation(run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config)
    strategy, grid = federation.strategy, Exchange(CLIENTS, run_config)
    strategy.recorder.begin(1)
    grid.send_and_receive(strategy.configure_evaluate(1, to_arrays(strategy.snapshot()), None, grid))  # type: ignore
    assert grid.answered
    for number, messages in each_bad(grid.answered, 0.1):
        strategy.letters = Letters(grid.sent)
        strategy.recorder.begin(1)
        with bounded(f"message {number}"):
            strategy.aggregate_evaluate(1, messages)
        score = strategy.recorder.score
        assert score is None or (0 <= score.sums["correct"] <= score.examples and abs(score.loss) < 1e30), (
            f"message {number}"
        )


def test_no_introduction_breaks_the_start(run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config)
    grid = Exchange(CLIENTS, run_config)
    federation.strategy.fleet.available(grid)  # type: ignore
    nodes, honest = list(grid.contexts), grid.answered
    used = 0

    class Answering(LocalGrid):
        def send_and_receive(self, messages: Iterable[Message], timeout: float | None = None) -> list[Message]:
            for sent, known in zip(messages, grid.sent, strict=True):
                sent.metadata.__dict__["_message_id"] = known.metadata.message_id
            return replies

    for number, replies in each_bad(honest, 0.1):
        fleet = Fleet(federation.config.server, federation.adapted.fingerprint)
        with bounded(f"message {number}"):
            fleet._meet(Answering(CLIENTS, run_config), nodes)  # type: ignore
        assert len(fleet.introductions) <= len(replies)
        assert all(len(reason) < 1100 for reason in fleet._refused.values())
        used += len(fleet.introductions)
    assert used


@pytest.mark.parametrize("send_", ["weights", "log"])
def test_no_task_breaks_a_client(send_: str, run_config: dict, tmp_path: Path) -> None:
    """Also where it repeats the server's rounds."""
    keys = run_config | {"method": "spry-per-iteration", "send": send_}
    federation = Federation(tmp_path, keys)
    federation.start(CLIENTS, rounds=2)
    grid = first_round(federation)
    federation.strategy.downlink._held = dict.fromkeys(grid.contexts, 0) if send_ == "log" else {}
    grid.sent += federation.strategy._messages(federation.strategy.tasks, "train")
    context = grid.contexts[100]
    node = load_node(federation.config, context.node_config)
    used = 0
    for number, messages in each_bad(grid.sent, 0.12):
        with bounded(f"message {number}"):
            used += prepared(messages[0], node, federation)
    assert used


def prepared(message: Message, node: Node, federation: Federation) -> bool:
    """What a client does with a task before it works."""
    try:
        expected_fingerprint(message), frame_in(message)
        task = Task.from_message(message)
        held = tensors_of(task, node, federation.strategy.method, federation.config, RecordDict())
        check_task(dataclasses.replace(task, tensors=held), node, federation.config)
    except SpryError as error:
        assert str(error)
        return False
    assert {name: value.shape for name, value in held.items()} == {n: v.shape for n, v in node.start.items()}
    assert all(torch.isfinite(value).all() for value in held.values())
    assert set(task.units) <= node.adapted.units.keys()
    assert 1 <= task.directions <= federation.config.client.directions
    return True


def test_no_frame_breaks_a_worker(run_config: dict, tmp_path: Path) -> None:
    """A real job, damaged: a frame, or the message and the context in it."""
    federation = Federation(tmp_path, run_config)
    grid = first_round(federation)
    context = grid.contexts[100]
    bodies = [message_to_proto(grid.sent[0]).SerializeToString(), context_to_proto(context).SerializeToString()]
    jobs, whole = Jobs(tmp_path / "at-work"), frame({"do": "train", "code": "x", "root": "/"}, bodies)
    for number in numbers(0.07):
        with bounded(f"frame {number}"):
            rng = random.Random(number)
            head = rng.choice([120, len(whole)])  # magic, length and JSON are a small part of it
            received(damaged(whole[:head], rng) + whole[head:])
    for number in numbers(0.01):
        rng = random.Random(number)
        header, broken = jobs({"do": "train"}, [damaged(body, rng) for body in bodies])
        assert "error" in header or len(broken) == 2


def frame(header: dict[str, Any], bodies: Sequence[bytes]) -> bytes:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        send(ours, header, bodies)
        ours.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: theirs.recv(1 << 16), b""))


def test_nobody_answers_for_another(run_config: dict, tmp_path: Path) -> None:
    """A reply is from who was sent what it answers: not from who it says, not twice, not of another round."""
    federation = Federation(tmp_path, run_config)
    grid = first_round(federation)
    mine, other, _ = grid.answered
    forged, stale = copied(mine, mine.content), copied(mine, mine.content)
    forged.metadata.__dict__["_src_node_id"] = other.metadata.src_node_id
    stale.metadata.__dict__["_reply_to_message_id"] = "message-0"
    accepted = federation.strategy._accept([stale, forged, mine, mine, other])
    assert len(accepted) == 2
    reasons = [reason.partition(": ")[2] for reason in federation.recorder.current.reasons]
    assert [reason.partition(":")[0] for reason in reasons] == [
        "it was not asked",
        "it was not asked",
        "it answered before",
        "no answer within server.round-timeout-s (600 s)",
    ]


def test_what_a_message_is_called_cannot_be_guessed(run_config: dict, tmp_path: Path) -> None:
    """Flower calls it by its hash. Two that are made alike, at one time, have two names."""
    task = Task(1, 0, {"a": torch.ones(2)}, ("u",), "f")
    names = set()
    for _ in range(2):
        message = task.to_message(5)
        message.metadata.__dict__["_created_at"] = 1.0
        names.add(message.object_id)
    assert len(names) == 2
