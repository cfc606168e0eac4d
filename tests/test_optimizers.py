"""Update rules: hand-derived numbers, and tensors without a gradient."""

import pytest
import torch

from spry_app.optimizers import CLIENT_OPTIMIZERS, SERVER_OPTIMIZERS, NamedOptimizer, Rule

HAND_DERIVED = {
    # One step from x=1, pseudo-gradient g=0.5, lr=0.1, beta1=0.9, beta2=0.99, tau=0.1: m=0.05, v0=tau^2=0.01, g^2=0.25.
    "average": 1 - 0.5,
    "sgd": 1 - 0.1 * 0.5,
    "momentum": 1 - 0.1 * 0.5,
    "adagrad": 1 - 0.1 * 0.05 / ((0.01 + 0.25) ** 0.5 + 0.1),
    "adam": 1 - 0.1 * 0.05 / ((0.99 * 0.01 + 0.01 * 0.25) ** 0.5 + 0.1),
    "yogi": 1 - 0.1 * 0.05 / ((0.01 + 0.01 * 0.25) ** 0.5 + 0.1),
}


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_the_first_server_step_is_what_the_paper_says(name: str) -> None:
    optimizer = NamedOptimizer({"x": torch.tensor([1.0])}, SERVER_OPTIMIZERS, Rule(name, 0.1, tau=0.1))
    optimizer.step({"x": torch.tensor([0.5])})
    assert optimizer.tensors["x"].item() == pytest.approx(HAND_DERIVED[name], rel=1e-6)


def test_yogi_lets_its_second_moment_shrink_slowly() -> None:
    # v=0.01+0.01*0.25=0.0125 after g=0.5; then g=0.01: v > g^2, so v=0.0125-0.01*0.0001. m=0.9*0.05+0.1*0.01=0.046.
    optimizer = NamedOptimizer({"x": torch.tensor([0.0])}, SERVER_OPTIMIZERS, Rule("yogi", 1.0, tau=0.1))
    optimizer.step({"x": torch.tensor([0.5])})
    before = optimizer.tensors["x"].item()
    optimizer.step({"x": torch.tensor([0.01])})
    assert before - optimizer.tensors["x"].item() == pytest.approx(0.046 / (0.012499**0.5 + 0.1), rel=1e-5)


@pytest.mark.parametrize(
    ("table", "name"), [(t, n) for t in (CLIENT_OPTIMIZERS, SERVER_OPTIMIZERS) for n in t], ids=lambda v: str(v)[:12]
)
def test_a_tensor_without_gradient_keeps_value_and_moments(table: dict, name: str) -> None:
    start = {"a": torch.ones(3), "b": torch.ones(3)}
    step = {"a": torch.full((3,), 0.3)}
    touched = NamedOptimizer(start, table, Rule(name, 0.1))
    touched.step(start | step)
    alone = NamedOptimizer(start, table, Rule(name, 0.1))
    alone.step(start | step)
    alone.step(step)
    assert torch.equal(alone.tensors["b"], touched.tensors["b"])
    touched.step({"b": torch.full((3,), 0.2)})
    alone.step({"b": torch.full((3,), 0.2)})
    assert torch.equal(alone.tensors["b"], touched.tensors["b"])
    assert not torch.equal(alone.tensors["a"], touched.tensors["a"])


def test_the_optimizer_never_writes_into_the_tensors_it_was_given() -> None:
    start = {"a": torch.ones(2)}
    NamedOptimizer(start, SERVER_OPTIMIZERS, Rule("average", 1.0)).step({"a": torch.ones(2)})
    assert torch.equal(start["a"], torch.ones(2))


def test_a_tensor_may_have_a_step_size_of_its_own() -> None:
    start, gradient = {"a": torch.ones(1), "head": torch.ones(1)}, {"a": torch.ones(1), "head": torch.ones(1)}
    optimizer = NamedOptimizer(start, SERVER_OPTIMIZERS, Rule("momentum", 0.1), {"head": 0.5})
    optimizer.step(gradient)
    assert optimizer.tensors["a"].item() == pytest.approx(0.9)
    assert optimizer.tensors["head"].item() == pytest.approx(0.5)
