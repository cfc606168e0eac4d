"""Clients that end at their deadline with part of their steps: what they send, and what it weighs."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, same, tiny_run
from flwr.app import Message
from test_refused_replies import ASKED, SOUND
from test_slope_log_file import main_status

from spry_app.client import answer
from spry_app.client.deadline import until
from spry_app.client.step import Step
from spry_app.client.training import train
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.protocol import from_arrays
from spry_app.report import render
from spry_app.server.checks import problem

CLIENTS, STEPS = 3, 8
STEP_S = (1.0, 2.0, 100.0)
"""What a step takes on each node. Within 8.5 s that makes 8 of 8 steps, 4, and the one that is always done."""
DONE = (8, 4, 1)
DEADLINE = {"client.deadline-s": 8.5}


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    keys = {"client.local-steps": STEPS, "server.optimizer": "average", "server.fraction-evaluate": 0.0}
    return tiny_run(tmp_path_factory.mktemp("tiny")) | keys | {"method": "fedavg", "num-server-rounds": 100}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """On which the steps of a node take as long as its STEP_S, and nothing else takes any time."""
    now, estimate = [0.0], Step.estimate

    def timed(self: Step, *arguments: Any) -> Any:
        now[0] += STEP_S[self.node.partition]
        return estimate(self, *arguments)

    monkeypatch.setattr(Step, "estimate", timed)
    monkeypatch.setattr(answer, "train_node", functools.partial(train, clock=lambda: now[0]))


@pytest.mark.parametrize(
    ("took", "deadline", "done"),
    [
        ([1.0] * 9, math.inf, 9),
        ([1.0] * 9, 3.9, 3),
        ([1.0] * 9, 3.0, 3),
        ([5.0] * 9, 0.1, 1),
        ([5.0] + [1.0] * 8, 8.9, 1),  # the second would take 5 s again
        ([4.0] + [1.0] * 8, 9.5, 6),  # 4, 5, 6, 7, 8, 9: the first is forgotten after two
        ([1.0, 3.0, 1.0, 1.0, 1.0], 8.0, 5),
        ([1.0, 3.0, 1.0, 1.0, 1.0], 7.0, 3),
        ([], 1.0, 0),
    ],
)
def test_no_step_begins_that_would_end_late(took: Sequence[float], deadline: float, done: int) -> None:
    over: list[float] = []
    for number in until(deadline, range(len(took)), lambda: sum(over)):
        assert number == len(over)
        over.append(took[number])
    assert len(over) == done


def replies_of(federation: Federation, rounds: int = 1) -> list[dict[int, Any]]:
    """Of each round, what each partition sent."""
    sent: list[dict[int, Any]] = [{} for _ in range(rounds)]

    def watch(partition: int, reply: Message) -> Message:
        sent[int(reply.metadata.group_id) - 1][partition] = reply.content
        return reply

    federation.start(CLIENTS, rounds=rounds, tamper=watch)
    return sent


def test_a_reply_at_the_deadline_is_that_of_so_many_steps_and_every_step_counts_the_same(
    run_config: dict, tmp_path: Path, clock: None
) -> None:
    """The reference are federations that are asked for 8, 4 and 1 steps; all batches have 8 rows, so the mean change is
    the plain one.
    """
    federation = Federation(tmp_path / "run", run_config | DEADLINE)
    (sent,) = replies_of(federation)
    wanted = {}
    for client, steps in enumerate(DONE):
        alike = Federation(tmp_path / str(steps), run_config | {"client.local-steps": steps})
        wanted[client] = from_arrays(replies_of(alike)[0][client]["arrays"])
        assert same(from_arrays(sent[client]["arrays"]), wanted[client])
        metrics = sent[client]["metrics"]
        assert (metrics["steps"], metrics["steps-asked"], metrics["num-examples"]) == (steps, STEPS, 8 * steps)
    after = federation.strategy.snapshot()
    for name, value in after.items():
        torch.testing.assert_close(value, sum(found[name] for found in wanted.values()) / CLIENTS)
    line = federation.recorder.rounds[-1]
    assert (line.answered, line.refused, line.partial, line.steps, line.steps_asked) == (3, 0, 2, 13, 24)
    said = "With client.deadline-s=8.5, 2 replies were of part of their local steps; in all, 13 of 24 were done."
    assert said in render([tmp_path / "run"])


@pytest.mark.parametrize("method", ["fedavg", "spry-per-iteration", "fedsgd"])
def test_a_deadline_that_nobody_reaches_changes_no_bit(
    method: str, run_config: dict, tmp_path: Path, clock: None
) -> None:
    results = []
    for deadline in (0.0, 550.0):
        keys = {"method": method, "client.deadline-s": deadline, "client.local-steps": 5, "server.optimizer": "sgd"}
        federation = Federation(tmp_path / str(deadline), run_config | keys)
        federation.start(CLIENTS, rounds=2)
        results.append(federation.strategy.snapshot())
        assert [line.partial for line in federation.recorder.rounds] == [0, 0, 0]
    assert same(*results)


@pytest.mark.parametrize(
    "method",
    ["spry-per-iteration", "decomfl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("baffle", "fedspzo"))],
)
def test_the_server_repeats_the_steps_that_were_done(
    method: str, run_config: dict, tmp_path: Path, clock: None, capsys: pytest.CaptureFixture
) -> None:
    """By weights and by the log a run has the same bits, and `spry rebuild` has them too: it compares digests."""
    results = []
    for send in ("weights", "log"):
        keys = {"method": method, "send": send, "client.head-learning-rate": 0.1}
        federation = Federation(tmp_path / send, run_config | DEADLINE | keys)
        federation.start(CLIENTS, rounds=2)
        assert [line.steps for line in federation.recorder.rounds[1:]] == [13, 13]
        assert not any(line.refused for line in federation.recorder.rounds)
        results.append(federation.strategy.snapshot())
    assert same(*results)
    log = tmp_path / "log" / "slopes.jsonl"
    assert main_status("rebuild", str(log), "--output", str(tmp_path / "adapter")) == 0
    assert "after round 2" in capsys.readouterr().out


def test_shared_directions_are_averaged_step_by_step(run_config: dict, tmp_path: Path, clock: None) -> None:
    """By hand: of a step that one client of three has done, a third of its slopes."""
    keys = {"method": "decomfl", "head-gradient": "forward"}
    federation = Federation(tmp_path, run_config | DEADLINE | keys)
    entries, entry = [], federation.strategy.entry
    federation.strategy.entry = lambda accepted: entries.append(entry(accepted)) or entries[-1]  # type: ignore
    (sent,) = replies_of(federation)
    slopes = [torch.tensor(sent[client]["metrics"]["slopes"]).view(-1, 2).double() for client in range(CLIENTS)]
    (measured,) = entries[-1].measured
    assert measured.examples == 3 * 8 * STEPS
    for step, found in enumerate(measured.slopes):
        done = [own[step] for own in slopes if step < len(own)]
        torch.testing.assert_close(torch.tensor(found).double(), sum(done) / CLIENTS)


def test_gradients_weigh_the_examples_they_are_of(run_config: dict, tmp_path: Path, clock: None) -> None:
    """By hand: a gradient is a mean over its batches, so 8, 4 and 1 of them count as such."""
    keys = {"method": "fedsgd", "server.optimizer": "sgd", "server.learning-rate": 0.5}
    federation = Federation(tmp_path, run_config | DEADLINE | keys | {"server.head-learning-rate": 0.0})
    before = federation.strategy.snapshot()
    (sent,) = replies_of(federation)
    gradients = [from_arrays(sent[client]["arrays"]) for client in range(CLIENTS)]
    after = federation.strategy.snapshot()
    for name in before:
        mean = sum(steps * gradient[name] for steps, gradient in zip(DONE, gradients, strict=True)) / sum(DONE)
        torch.testing.assert_close(after[name], before[name] - 0.5 * mean, rtol=1e-4, atol=1e-6)


def test_of_whole_passes_too_every_example_counts_the_same(run_config: dict, tmp_path: Path, clock: None) -> None:
    """Nobody but the node knows how many steps those are: 24 rows are 3 batches a pass, 9 steps."""
    keys = {"client.local-steps": 0, "client.local-epochs": 3}
    federation = Federation(tmp_path, run_config | DEADLINE | keys)
    (sent,) = replies_of(federation)
    assert [sent[c]["metrics"]["steps-asked"] for c in range(CLIENTS)] == [9, 9, 9]
    assert [sent[c]["metrics"]["steps"] for c in range(CLIENTS)] == [8, 4, 1]
    after = federation.strategy.snapshot()
    tensors = [from_arrays(sent[client]["arrays"]) for client in range(CLIENTS)]
    for name, value in after.items():
        torch.testing.assert_close(value, sum(found[name] for found in tensors) / CLIENTS)


PART = {"steps": 3, "steps_asked": 4, "slopes": ((1.0, 2.0),) * 3, "forwards": 1.0}


@pytest.mark.parametrize(
    ("asked", "change", "reason"),
    [
        ({"partial": True}, {}, ""),
        ({"partial": True}, {"steps": 4, "slopes": ((1.0, 2.0),) * 4}, ""),
        ({}, {}, "it did 3 of 4 local steps; asked for were at least all of 4"),
        ({"partial": True}, {"steps": 0, "slopes": ()}, "it did 0 of 4 local steps; asked for were at least 1 of 4"),
        ({"partial": True}, {"steps": 5, "slopes": ((1.0, 2.0),) * 5}, "it did 5 of 4"),
        ({"partial": True}, {"steps_asked": 3}, "it did 3 of 3 local steps; asked for were at least 1 of 4"),
        ({"partial": True}, {"steps_asked": 10**9}, "it did 3 of 1000000000 local steps"),
        ({"partial": True}, {"slopes": ((1.0, 2.0),) * 4}, "4 steps of 2 slopes; asked for were 3 steps of 2"),
        ({"partial": True}, {"examples": 25}, "trained on 25 examples; it can be 1 to 24"),
        ({"partial": True, "steps": 0}, {"examples": 24}, ""),
        ({"partial": True, "steps": 0}, {"steps_asked": 2**40}, "it did 3 of 1099511627776 local steps"),
        ({"partial": True, "steps": 0}, {"steps": -3, "steps_asked": -4}, "it did -3 of -4 local steps"),
        # With so few of so many steps even one example would weigh more than all that can be.
        ({"partial": True, "steps": 0}, {"steps_asked": 100}, "trained on 8 examples; it can be 1 to 0"),
    ],
)
def test_a_partial_reply_is_fit_only_where_a_deadline_was_set(asked: dict, change: dict, reason: str) -> None:
    wanted = dataclasses.replace(ASKED, **{"steps": 4, "examples": 32} | asked)
    found = problem(dataclasses.replace(SOUND, **PART | change), wanted)
    assert reason in found if reason else not found


def test_a_deadline_beyond_the_end_of_the_round_is_refused() -> None:
    with pytest.raises(SpryError, match=r"client\.deadline-s is 600, but .*server\.round-timeout-s = 600"):
        RunConfig.from_flower({"client.deadline-s": 600.0})


def test_a_node_is_not_sent_a_deadline_that_is_none(run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config)
    grid = federation.start(CLIENTS, rounds=1)
    task = next(iter(federation.strategy.tasks.values()))
    node = answer.load_node(federation.config, next(iter(grid.contexts.values())).node_config)
    for deadline in (math.nan, math.inf, -1.0):
        with pytest.raises(SpryError, match=r"a deadline of .* s is none"):
            answer.check_task(dataclasses.replace(task, deadline_s=deadline), node, federation.config)
