"""Step sizes over the rounds: against steps taken by hand, on the server and on clients, resumed and rebuilt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from federation import same, tiny_run
from whole_runs import end_early, start

from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import get_method
from spry_app.methods.global_state import GlobalState
from spry_app.methods.schedule import client_scale, server_scale
from spry_app.models import load_model
from spry_app.optimizers import CLIENT_OPTIMIZERS, SERVER_OPTIMIZERS, NamedOptimizer, Rule
from spry_app.protocol import from_arrays
from spry_app.server.rebuild import rebuild
from spry_app.slope_log import read
from spry_app.tasks import get_task

BY_HAND = {"constant": [1, 1, 1, 1], "linear": [1, 0.75, 0.5, 0.25], "cosine": [1, 0.853553391, 0.5, 0.146446609]}


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_run(tmp_path_factory.mktemp("tiny")) | {"num-server-rounds": 4, "schedule": "linear"}


@pytest.mark.parametrize("schedule", BY_HAND)
@pytest.mark.parametrize(("method", "server_steps"), [("spry", True), ("fedavg", False), ("fedyogi", True)])
def test_one_side_has_the_scale(schedule: str, method: str, server_steps: bool) -> None:
    config = RunConfig.from_flower({"schedule": schedule, "num-server-rounds": 4, "method": method})
    found = [
        (server_scale(config, get_method(config), round_), client_scale(config, get_method(config), round_))
        for round_ in (1, 2, 3, 4)
    ]
    assert found == [(scale, 1.0) if server_steps else (1.0, scale) for scale in BY_HAND[schedule]]


@pytest.mark.parametrize(
    ("table", "name"),
    [(t, n) for t in (CLIENT_OPTIMIZERS, SERVER_OPTIMIZERS) for n in t if n != "average"],
    ids=lambda value: str(value)[:12],
)
def test_half_the_scale_is_half_the_step_with_the_same_moments(table: dict, name: str) -> None:
    whole, half = (
        NamedOptimizer({"a": torch.zeros(3), "b": torch.zeros(2)}, table, Rule(name, 0.1), {"b": 0.01})
        for _ in range(2)
    )
    for gradient in (
        {"a": torch.tensor([0.3, -1.0, 2.0]), "b": torch.ones(2)},
        {"a": torch.ones(3), "b": -torch.ones(2)},
    ):
        before = whole.tensors["a"].clone(), half.tensors["a"].clone()
        whole.step(gradient)
        half.step(gradient, scale=0.5)
        torch.testing.assert_close(half.tensors["a"] - before[1], (whole.tensors["a"] - before[0]) / 2)
    assert same(whole.moments, half.moments)
    torch.testing.assert_close(half.tensors["b"], whole.tensors["b"] / 2)


def test_each_round_of_a_run_takes_its_part(run_config: dict, tmp_path: Path) -> None:
    """As its log has it: every round is one of a run without a schedule, whose step size is that round's part."""
    run_config = run_config | {
        "method": "spry-per-iteration",
        "server.optimizer": "momentum",
        "head-gradient": "forward",
    }
    done = start(run_config, tmp_path / "run")
    assert rebuild(tmp_path / "run" / "slopes.jsonl", tmp_path / "adapter") == 4
    _, entries = read(tmp_path / "run" / "slopes.jsonl")
    first = RunConfig.from_flower(run_config)
    tensors = load_model(first.model, first.adapter, 2, first.seed, task=get_task(first.data)).tensors()
    moments: dict[str, torch.Tensor] = {}
    for scale, (entry, digest) in zip(BY_HAND["linear"], entries, strict=True):
        rates = {
            "server.learning-rate": scale * 0.05,
            "server.head-learning-rate": scale * 0.03,
            "schedule": "constant",
        }
        state = GlobalState(tensors, done.adapted.units, done.method, RunConfig.from_flower(run_config | rates))
        state.load(entry.round - 1, tensors, moments)
        state.follow(entry)
        assert state.digest() == digest
        tensors, moments = state.tensors, state.optimizer.moments


@pytest.mark.parametrize("method", ["spry-per-iteration", "decomfl", "fedavg"])
def test_a_resumed_run_keeps_the_scale(method: str, run_config: dict, tmp_path: Path) -> None:
    run_config = run_config | {"method": method, "server.fraction-train": 0.6}
    whole, steady = start(run_config, tmp_path / "whole"), start(run_config | {"schedule": "constant"}, tmp_path / "s")
    end_early(run_config, tmp_path / "parts", 3)
    parts = start(run_config, tmp_path / "parts", resume=str(tmp_path / "parts"))
    assert same(from_arrays(whole.arrays), from_arrays(parts.arrays))
    assert not same(from_arrays(whole.arrays), from_arrays(steady.arrays))


def test_a_run_with_a_schedule_has_the_rounds_that_it_has(run_config: dict, tmp_path: Path) -> None:
    start(run_config, tmp_path)
    more = {"num-server-rounds": 6, "resume": str(tmp_path)}
    with pytest.raises(
        SpryError, match=r"with num-server-rounds=6 \(it was 4\).* Only server\.wait-timeout-s, .*stop\.\*"
    ):
        start(run_config, tmp_path, **more)
