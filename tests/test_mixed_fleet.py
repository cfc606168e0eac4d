"""Rounds in which clients take gradients of unequal kinds: what they are asked, what it costs, what becomes of it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, LocalGrid, make_rows, same, tiny_run
from flwr.app import Message
from safetensors.torch import load_file
from whole_runs import CLIENTS, end_early, start

from spry_app.autodiff.gradients import GRADIENTS
from spry_app.client.answer import check_task
from spry_app.client.node import load_node
from spry_app.client.trust import trusted
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.protocol import Introduction, MalformedReply, Task, TrainReply, from_arrays, introduction_request
from spry_app.server.checkpoint import NAME


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    keys = {"method": "mixed_fleet:mixed", "server.fraction-evaluate": 0.0, "server.evaluate-every": 100}
    keys |= {"server.weighting": "precision", "client.directions-at-once": 2}
    return tiny_run(folder) | keys | {"data.test": str(make_rows(folder / "test.jsonl", 16, offset=500))}


def test_each_client_is_charged_for_the_gradient_that_it_takes(run_config: dict, tmp_path: Path) -> None:
    """Passes an example over all blocks: checkpointing 1 + 2, one direction 1 + 1, two at once 1 + 2; exact heads are
    from the same passes.
    """
    federation = Federation(tmp_path, run_config)
    costs: dict[int, float] = {}

    def watch(partition: int, reply: Message) -> Message:
        metrics = reply.content["metrics"]
        costs[partition] = metrics["forwards"] / metrics["num-examples"]
        return reply

    federation.start(CLIENTS, rounds=1, tamper=watch)
    tasks = {task.client: task for task in federation.strategy.tasks.values()}
    assert [(tasks[c].gradient, tasks[c].directions) for c in range(CLIENTS)] == [
        ("checkpointed-backprop", 1),
        ("", 1),
        ("", 2),
    ]
    assert costs == {0: pytest.approx(3.0), 1: pytest.approx(2.0), 2: pytest.approx(3.0)}
    assert federation.recorder.current.forwards == pytest.approx((3 + 2 + 3) * 16)
    assert federation.recorder.current.answered == CLIENTS


def test_a_reply_that_costs_more_than_its_own_gradient_may_is_refused(run_config: dict, tmp_path: Path) -> None:
    """The most, with two passes for head and prefix: 5 an example for checkpointing, 4 for one direction."""
    federation = Federation(tmp_path, run_config)

    def dear(partition: int, reply: Message) -> Message:
        metrics = reply.content["metrics"]
        metrics["forwards"] = 4.5 * metrics["num-examples"]
        return reply

    federation.start(CLIENTS, rounds=1, tamper=dear)
    now = federation.recorder.current
    assert (now.answered, now.refused) == (2, 1)
    assert "cannot have taken 72" in now.reasons[0]


@pytest.mark.parametrize("method", ["mixed", "mixed_gradient", "mixed_nearest", "mostly_exact"])
def test_an_exact_client_replies_with_the_exact_gradient(method: str, run_config: dict, tmp_path: Path) -> None:
    """As if everyone took it: one local step of the same rows, the head too."""
    keys = {"client.local-steps": 1, "server.optimizer": "sgd", "client.candidates": 4}
    seen: list[dict[str, torch.Tensor]] = []

    def watch(partition: int, reply: Message) -> Message:
        if partition == 0:
            seen.append(from_arrays(reply.content["arrays"]))
        return reply

    federation = Federation(tmp_path / "mixed", run_config | keys | {"method": f"mixed_fleet:{method}"})
    federation.start(CLIENTS, rounds=2, tamper=watch)
    assert not federation.recorder.current.refused
    alone = "fedsgd" if method == "mixed_gradient" else "fedavg"
    exact = {"method": alone, "gradient": "checkpointed-backprop", "server.weighting": "examples"}
    Federation(tmp_path / "exact", run_config | keys | exact).start(CLIENTS, rounds=1, tamper=watch)
    for name, value in seen[0].items():
        torch.testing.assert_close(value, seen[2][name], rtol=1e-5, atol=1e-7)


def test_a_mean_by_precision_is_closer_to_the_exact_client(run_config: dict, tmp_path: Path) -> None:
    """With d = 256 and c = 100 an exact gradient weighs as much as 279 of one direction.

    By hand: c + r (B + c) = 100 for an exact one, 100 + 257 * 108 for K = 1, 100 + 128.5 * 108 for K = 2.
    """
    variances = [100.0, 100 + 257 * 108, 100 + 128.5 * 108]
    weights = [16 / variance for variance in variances]
    replies: dict[int, dict[str, torch.Tensor]] = {}

    def watch(partition: int, reply: Message) -> Message:
        replies[partition] = from_arrays(reply.content["arrays"])
        return reply

    federation = Federation(tmp_path, run_config | {"server.optimizer": "average"})
    units = federation.strategy.units
    federation.start(CLIENTS, rounds=1, tamper=watch)
    after = federation.strategy.snapshot()
    for unit, names in units.items():
        parts = [1 / 3] * 3 if unit == "head" else [weight / sum(weights) for weight in weights]
        for name in names:
            expected = sum(part * replies[client][name] for client, part in enumerate(parts))
            torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6)
    noise = federation.recorder.current.noise
    assert noise is not None and noise["units"].keys() == units.keys()


def test_a_resumed_run_of_a_mixed_fleet_is_the_uninterrupted_one_to_the_bit(run_config: dict, tmp_path: Path) -> None:
    """Two clients of each kind but one, so that a round tells the next what single examples' gradients are like."""
    run_config = run_config | {"num-server-rounds": 4, "noise.scale-step": True}
    whole = start(run_config, tmp_path / "whole", LocalGrid(5, run_config))
    end_early(run_config, tmp_path / "parts", 3, clients=5)
    parts = start(run_config, tmp_path / "parts", LocalGrid(5, run_config), resume=str(tmp_path / "parts"))
    assert same(from_arrays(whole.arrays), from_arrays(parts.arrays))
    kept = [load_file(tmp_path / run / NAME)["weighting:spread"] for run in ("whole", "parts")]
    assert torch.equal(*kept) and bool(kept[0].all())
    assert [line.noise for line in whole.recorder.rounds] == [line.noise for line in parts.recorder.rounds]


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("mixed_slopes", 'must be of one kind.*reply="weights".*assign'),
        ("nowhere", "gradient='psychic'; known: forward-mode"),
    ],
)
def test_gradients_that_cannot_be_mixed_are_refused_in_words(
    method: str, says: str, run_config: dict, tmp_path: Path
) -> None:
    keys = {"method": f"mixed_fleet:{method}", "server.weighting": "examples"}
    with pytest.raises(SpryError, match=says):
        Federation(tmp_path, run_config | keys).start(CLIENTS, rounds=1)


def test_names_of_gradients_travel_and_nothing_else_in_their_place() -> None:
    task = Task(1, 0, {"a": torch.ones(2)}, ("u",), "f", gradient="backprop")
    assert Task.from_message(task.to_message(1)).gradient == "backprop"
    for gradient in ("Backprop", "a b", "x" * 65, "\x1b[2J"):
        with pytest.raises(MalformedReply, match="not a name"):
            Task.from_message(dataclasses.replace(task, gradient=gradient).to_message(1))
    said = Introduction(0, "x", 1, 0, "d", gradients=("backprop", "forward-mode"))
    request = introduction_request(1, "x")
    assert Introduction.from_message(said.to_message(request)) == said
    for gradients in (("a",) * 65, ("A",)):
        with pytest.raises(MalformedReply, match="gradients"):
            Introduction.from_message(dataclasses.replace(said, gradients=gradients).to_message(request))


def test_a_node_says_which_gradients_pass_its_self_test_and_refuses_one_it_does_not_know(run_config: dict) -> None:
    config = RunConfig.from_flower(run_config)
    node = load_node(config, {"partition-id": 0, "num-partitions": CLIENTS})
    assert set(trusted(node, GRADIENTS["forward-mode"], 1)) == GRADIENTS.keys() - {"bisected-backprop"}
    assert set(trusted(node, GRADIENTS["backprop"], 1)) == GRADIENTS.keys() - {"forward-mode", "bisected-backprop"}
    assert set(trusted(node, GRADIENTS["backprop"], 1, every=True)) == GRADIENTS.keys()
    task = Task(1, 0, node.start, ("head",), "", gradient="psychic")
    with pytest.raises(SpryError, match="'psychic'"):
        check_task(task, node, config)


def test_a_client_of_another_kind_takes_the_step_of_that_kind(run_config: dict, tmp_path: Path) -> None:
    """The slopes of a mixed round are those of a round where all take them."""
    seen: list[TrainReply] = []

    def watch(partition: int, reply: Message) -> Message:
        if partition == 2:
            seen.append(from_arrays(reply.content["arrays"]))
        return reply

    for method in ("mixed_fleet:mixed", "spry"):
        keys = {"method": method} | ({"assign": "every-unit"} if method == "spry" else {})
        Federation(tmp_path / method[:4], run_config | keys).start(CLIENTS, rounds=1, tamper=watch)
    assert same(*seen)
