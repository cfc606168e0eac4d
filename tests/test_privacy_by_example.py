"""What a row says in a step is bounded, the step has the noise that is counted, what follows is made of it alone."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch
from federation import Federation, same, tiny_run
from hypothesis import given
from hypothesis import strategies as st
from test_privacy_in_rounds import assert_normal, flat
from whole_runs import end_early, start

from spry_app.autodiff.budget import Slices
from spry_app.autodiff.costs import Cost
from spry_app.autodiff.directions import Seed, direction
from spry_app.autodiff.gradients import GRADIENTS, Estimate
from spry_app.autodiff.slopes import Part
from spry_app.client.examples import ByExample, by_example
from spry_app.client.node import Node, load_node
from spry_app.client.step import Step
from spry_app.client.training import _local_batches, train
from spry_app.config import PrivacyConfig, RunConfig
from spry_app.errors import SpryError
from spry_app.methods import METHODS, Layout, get_method
from spry_app.methods.global_state import GlobalState
from spry_app.methods.replay import exact_names, passes, steps_in_full
from spry_app.privacy import Secret
from spry_app.protocol import Task, TrainReply
from spry_app.server.accountant import Release, epsilon

CLIENTS = 3
UNIT = {"privacy.mode": "local", "privacy.unit": "example"}
SECRET = Secret(bytes(range(32)))
pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    keys = {"client.candidates": 4, "client.upper-directions": 2, "client.micro-batch": 4}
    return tiny_run(tmp_path_factory.mktemp("tiny")) | keys | UNIT


def node_of(config: RunConfig) -> Node:
    return load_node(config, {"partition-id": 0, "num-partitions": CLIENTS})


def mechanism(size: int, **keys: Any) -> ByExample:
    """With next to no noise, unless it is asked for."""
    return ByExample(PrivacyConfig().model_copy(update={"noise_multiplier": 1e-12} | keys), SECRET, ("step", 0), size)


# -- a step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["forward-mode", "backprop"])
@pytest.mark.parametrize("rows", [range(8), range(3)], ids=["whole", "short"])
def test_a_step_is_the_mean_of_what_a_loop_over_rows_finds_and_bounds(way: str, rows: range, run_config: dict) -> None:
    """The loop goes back through the whole model for each row; a slope is that gradient along the direction. Half of
    the rows are longer than the bounds. A short batch is divided by eight all the same.
    """
    config = RunConfig.from_flower(run_config)
    node, seed, gradient = node_of(config), Seed(7, 1, 2, 3), GRADIENTS[way]
    tensors, units = node.adapted.tensors(), node.adapted.units
    tensors = {name: value + 0.05 * direction(Seed(9, 9, 9, 9), 0, tensors)[name] for name, value in tensors.items()}
    exact = exact_names(units, dataclasses.replace(METHODS["spry"], gradient=gradient), "exact")
    direct = exact or tensors.keys()
    along = [direction(seed, k, {n: v for n, v in tensors.items() if n not in direct}) for k in range(4)]
    slopes, grads = [], []
    for row in rows:
        leaves = {name: value.clone().requires_grad_(True) for name, value in tensors.items()}
        batch = node.train.inputs([row])
        loss = node.train.task.loss(node.adapted.bound(leaves), batch, node.train.aims([row]))
        grad = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        grads.append(flat({name: grad[name] for name in direct}))
        slopes.append(torch.tensor([sum(float((grad[n] * v[n]).sum()) for n in v) for v in along]).double())
    bounds = [float(torch.stack([v.norm() for v in each]).median()) or 1.0 for each in (slopes, grads)]
    told_slopes, told_grad = (
        sum(v * min(1.0, most / max(float(v.norm()), 1e-30)) for v in each) / 8
        for each, most in zip((slopes, grads), bounds, strict=True)
    )
    alone = mechanism(8, clip_slopes=bounds[0], clip=bounds[1])
    found, forwards = Step(node, gradient, exact, 4, Slices(4, 2), alone=alone).estimate(rows, tensors, seed)
    assert torch.allclose(flat({name: found.gradient[name] for name in direct}), told_grad, rtol=1e-3, atol=1e-6)
    assert len(found.slopes) == (4 if exact else 0)
    if exact:
        assert torch.allclose(torch.tensor(found.slopes).double(), told_slopes, rtol=1e-3, atol=1e-6)
        rest = {name: value for name, value in tensors.items() if name not in direct}
        assert same({n: found.gradient[n] for n in rest}, gradient.combine(found.slopes, seed, rest))
    _, plain = Step(node, gradient, exact, 4, Slices(1, 2)).estimate(rows, tensors, seed)
    assert forwards == plain


def made_up(said: list[list[float]], way: str = "forward-mode") -> tuple[Any, list[Part]]:
    """Rows that say such numbers: the first half as slopes, the others as the exact gradient of "a"."""
    parts = [Part(lambda params: torch.zeros(()), 1 / len(said)) for _ in said]
    told = dict(zip(map(id, (part.objective for part in parts)), said, strict=True))

    def of(batch: Any) -> Estimate:
        (part,) = batch
        numbers = told[id(part.objective)]
        half = len(numbers) // 2
        gradient = {"a": torch.tensor(numbers[half:]), "b": torch.zeros(2)}
        return Estimate(0.0, gradient, tuple(numbers[:half]), Cost(1))

    return of, parts


def step_of(said: list[list[float]], alone: ByExample, step: int = 0) -> torch.Tensor:
    """Slopes and exact gradient of one batch."""
    of, parts = made_up(said)
    params = {"a": torch.zeros(len(said[0]) - len(said[0]) // 2), "b": torch.zeros(2)}
    found = alone.estimate(of, parts, GRADIENTS["forward-mode"], {"a"}, params, Seed(0, 1, 0, step))
    return torch.cat([torch.tensor(found.slopes).double(), found.gradient["a"].double()])


ROW = st.lists(st.floats(width=32), min_size=6, max_size=6)


@given(st.lists(ROW, min_size=1, max_size=5), ROW)
def test_one_row_in_place_of_another_moves_a_step_by_no_more_than_twice_the_bound(
    rows: list[list[float]], other: list[float]
) -> None:
    """Over the size, for slopes and gradient each, though the row says something endless or no number at all."""
    alone = mechanism(5, clip_slopes=0.5, clip=2.0)
    difference = step_of(rows, alone) - step_of([other, *rows[1:]], alone)
    assert float(difference[:3].norm()) <= 2 * 0.5 / 5 * (1 + 1e-6)
    assert float(difference[3:].norm()) <= 2 * 2.0 / 5 * (1 + 1e-6)


def test_slopes_and_gradient_of_a_step_have_the_noise_that_is_counted() -> None:
    """Of each step anew, and again the same where the same is asked."""
    alone = mechanism(4, clip_slopes=0.5, clip=2.0, noise_multiplier=1.5)
    row = [[0.1, -0.2, 0.0, 0.3, 0.1, -0.1]] * 3
    plain = 3 * torch.tensor(row[0]).double() / 4
    draws = torch.stack([step_of(row, alone, step) - plain for step in range(600)])
    assert_normal(draws[:, :3].flatten(), 1.5 * 0.5 / 4)
    assert_normal(draws[:, 3:].flatten(), 1.5 * 2.0 / 4)
    assert len({tuple(draw.tolist()) for draw in draws}) == 600
    assert torch.equal(step_of(row, alone, 7) - plain, draws[7])
    other = dataclasses.replace(alone, secret=Secret(bytes(32)))
    assert not torch.equal(step_of(row, other, 7), step_of(row, alone, 7))


# -- a task ------------------------------------------------------------------------------------------------------------


def trained(run_config: dict, method_name: str, **keys: Any) -> tuple[Node, Task, TrainReply, RunConfig]:
    """The first client's work in a first round, on half of the units and the head."""
    config = RunConfig.from_flower(run_config | {"method": method_name} | keys)
    node = node_of(config)
    units = [unit for unit in node.adapted.units if unit != "head"]
    task = Task(1, 0, node.start, (*units[: len(units) // 2 + 1], "head"), "", directions=2)
    method = get_method(config).on(Layout(node.adapted.depths(), len(node.adapted.blocks)), config.client)
    return node, task, train(node, task, method, config, Slices(4, 2)), config


def test_the_server_rebuilds_the_tensors_of_the_client_to_the_bit(run_config: dict) -> None:
    """Slopes of five noisy steps, against the weights of a client that took the same."""
    keys = {"client.local-steps": 5, "client.optimizer": "adam"}
    node, task, scalars, config = trained(run_config, "spry-per-iteration", **keys)
    _, _, weights, _ = trained(run_config, "spry", **keys)
    assert [len(step) for step in scalars.slopes] == [2] * 5
    state = GlobalState(node.start, node.adapted.units, get_method(config), config)
    _, rebuilt = state.trained(state.measured(0, 0, task.units, scalars.examples, scalars.slopes), 1)
    assert same(rebuilt | scalars.tensors, weights.tensors)
    _, _, plain, _ = trained(run_config | {"privacy.mode": "", "privacy.unit": "client"}, "spry", **keys)
    assert not same(plain.tensors, weights.tensors)


def test_a_batch_larger_than_the_shard_is_divided_by_the_shard(run_config: dict) -> None:
    config = RunConfig.from_flower(run_config)
    task = Task(1, 0, {}, (), "")
    assert [by_example(task, rows, config).size for rows in (5, 8, 100)] == [5, 8, 8]  # type: ignore[union-attr]
    assert by_example(task, 5, RunConfig.from_flower({"privacy.mode": "local"})) is None


@pytest.mark.parametrize("method", ["fedavg", "spry-per-iteration"])
@pytest.mark.parametrize(
    ("batch_size", "local_steps", "epochs"), [(8, 0, 1), (8, 0, 3), (8, 7, 1), (5, 3, 2), (100, 4, 1)]
)
def test_no_row_is_in_more_batches_than_are_counted_and_one_is_in_so_many(
    method: str, batch_size: int, local_steps: int, epochs: int, run_config: dict
) -> None:
    keys = {"client.batch-size": batch_size, "client.local-steps": local_steps, "client.local-epochs": epochs}
    config = RunConfig.from_flower(run_config | keys)
    task = Task(1, 0, {}, (), "")
    for rows in (1, 7, 8, 24, 30):
        steps = steps_in_full(rows, METHODS[method], config.client)
        batches = _local_batches(steps, rows, task, config)
        seen = Counter(row for batch in batches for row in batch)
        assert max(seen.values()) == passes(rows, METHODS[method], config.client)


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_with_it_or_says_why_not(method: str, run_config: dict, tmp_path: Path) -> None:
    keys = {"method": method, "num-server-rounds": 1, "client.local-steps": 1}
    if method == "fwdllm":
        with pytest.raises(SpryError, match=r"Set client\.variance-threshold=0, which always uses client\.directions"):
            get_method(RunConfig.from_flower(run_config | keys))
        keys["client.variance-threshold"] = 0.0
    federation = Federation(tmp_path, run_config | keys)
    before = federation.strategy.snapshot()
    federation.start(CLIENTS)
    line = federation.recorder.rounds[-1]
    assert (line.answered, line.refused, line.train_loss, line.personalised_accuracy) == (CLIENTS, 0, None, None)
    parts = 2 if METHODS[method].gradient.slopes else 1
    assert line.epsilon == epsilon([Release(1, 1)], 1 / (2 * math.sqrt(parts)), 1e-5)
    assert not same(federation.strategy.snapshot(), before)


def test_steps_of_slopes_and_a_head_cost_what_an_accountant_of_another_kind_finds(
    run_config: dict, tmp_path: Path
) -> None:
    """24 rows in batches of 8: four steps are two passes, in each of which a row is told of twice, with a noise of
    twice its sensitivity (four times the bound): by slopes, and by the gradient of the head. By the composition of
    privacy loss distributions.
    """
    keys = {"method": "spry-per-iteration", "client.local-steps": 4, "privacy.noise-multiplier": 4.0}
    federation = Federation(tmp_path, run_config | keys)
    federation.start(CLIENTS, rounds=2)
    accountant = dp_accounting.pld.PLDAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(2.0), 2 * 2 * 2)
    assert federation.recorder.rounds[-1].epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-4)


def test_a_run_that_goes_on_counts_on_and_ends_before_it_would_cost_too_much(run_config: dict, tmp_path: Path) -> None:
    """Two passes a round; killed when round 2 was heard, which counts twice therefore."""
    costs = [epsilon([Release(1, 1)] * count, 5.0, 1e-5) for count in range(0, 12, 2)]
    keys = {"method": "fedavg", "client.local-steps": 0, "client.local-epochs": 2, "privacy.noise-multiplier": 10.0}
    keys |= {"num-server-rounds": 9, "privacy.max-epsilon": (costs[4] + costs[5]) / 2, "data.test": ""}
    end_early(run_config | keys, tmp_path, 2)
    done = start(run_config | keys, tmp_path, resume=str(tmp_path))
    assert [line.epsilon for line in done.recorder.rounds] == [None, costs[1], costs[3], costs[4]]
    assert done.recorder.stopped.endswith("does not allow another round after 3")
    assert "differ in one example (each counted as if it were in 2 batches of every round)" in done.recorder.promised


@pytest.mark.parametrize("mode", ["", "central"])
def test_who_cannot_see_single_rows_is_told_so(mode: str) -> None:
    with pytest.raises(SpryError, match=r"use privacy\.mode 'local', or privacy\.unit 'client'|privacy\.mode is ''"):
        RunConfig.from_flower({"privacy.mode": mode, "privacy.unit": "example"})
