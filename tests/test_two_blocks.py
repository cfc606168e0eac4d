"""FedSPZO: two halves of a model, the upper one perturbed more often (arXiv 2502.10239v2)."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from federation import same
from torch import Tensor

from spry_app.autodiff.directions import Seed, Tensors, direction
from spry_app.autodiff.exact import estimate_with_exact
from spry_app.autodiff.gradients import Gradient
from spry_app.autodiff.slopes import Batch, Halves, Part
from spry_app.autodiff.two_blocks import two_blocks

H, P1, P2 = 0.25, 3, 4
SEED = Seed(1, 2, 3, 4)
LOW, HIGH = {"low.a", "low.b"}, {"high.a", "high.b"}


def problem(dtype: torch.dtype = torch.float64) -> tuple[Batch, Tensors]:
    """Cubic in the upper tensors and in the lower ones, so that smoothing over h moves the gradient."""
    generator = torch.Generator().manual_seed(0)
    params = {n: torch.randn(2, generator=generator, dtype=dtype) for n in sorted(LOW | HIGH)}

    def part(x: float, weight: float) -> Part:
        def lower(p: Tensors) -> Tensor:
            return x * p["low.a"] + p["low.b"] ** 3

        def upper(p: Tensors, hidden: Tensor) -> Tensor:
            return (hidden * p["high.a"]).sum() + (p["high.b"] ** 3).sum() + 0.5 * hidden.square().sum()

        halves = Halves(lower, upper)
        return Part(lambda p: upper(p, lower(p)), weight, lambda cut: halves)

    return [part(1.0, 0.25), part(-2.0, 0.75)], params


def gradient(upper: int = P2, h: float = H) -> Gradient:
    return two_blocks(h, upper, LOW, cut=1, share=0.5)


def by_hand(batch: Batch, params: Tensors) -> tuple[float, list[float], Tensors]:
    """The algorithm as METHODS.md tells it, from whole objectives alone; fp64."""
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    losses, slopes = [], []
    for p1 in range(P1):
        for p2 in range(P2):
            u = {n: direction(SEED, p1 if n in LOW else p1 * P2 + p2, {n: t})[n].double() for n, t in params.items()}
            ends = [{n: t + sign * H * u[n] for n, t in params.items()} for sign in (1, -1)]
            above, under = (sum(float(part.objective(end)) * part.weight for part in batch) for end in ends)
            losses += [above, under]
            slopes.append((above - under) / (2 * H))
            for n in total:
                total[n] += slopes[-1] * u[n] / (P1 * P2)
    return sum(losses) / len(losses), slopes, total


def test_an_estimate_is_that_of_the_algorithm_written_out() -> None:
    batch, params = problem()
    loss, slopes, expected = by_hand(batch, params)
    found = gradient().estimate(batch, params, SEED, P1, 1)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.slopes == pytest.approx(slopes, rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(found.gradient[name].double(), value, rtol=1e-5, atol=1e-5)


def test_scalars_stand_for_the_bits_that_the_client_measured() -> None:
    batch, params = problem()
    found = gradient().estimate(batch, params, SEED, P1, 1)
    assert len(found.slopes) == P1 * gradient().slopes_per_direction
    assert same(gradient().combine(found.slopes, SEED, params), found.gradient)
    some = {name: params[name] for name in ("high.a", "low.b")}
    assert same(gradient().combine(found.slopes, SEED, some), {name: found.gradient[name] for name in some})


def smoothed(part: Part, params: Tensors, h: float) -> Tensors:
    """E[s u] = E[grad L(w + h u)], the gradient of the loss smoothed over h, u ~ N(0, I) (Stein's lemma).

    Numbers at different places of the vectors do not mix in L, so each place is an expectation over 4 numbers, one a
    tensor; degrees are at most 6, so 5 points of Gauss and Hermite are exact.
    """
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(5))
    points = torch.cartesian_prod(*[nodes] * 4)
    chances = torch.cartesian_prod(*[weights / weights.sum()] * 4).prod(1)
    leaves = {
        name: (value + h * points[:, index, None]).requires_grad_()
        for index, (name, value) in enumerate(sorted(params.items()))
    }
    grads = torch.autograd.grad(part.objective(leaves), list(leaves.values()))  # a sum, over the points too
    return {name: (chances[:, None] * grad).sum(0) for name, grad in zip(leaves, grads, strict=True)}


def estimates(part: Part, params: Tensors, h: float, upper: int, count: int) -> dict[str, Tensor]:
    way, batch = gradient(upper, h), [dataclasses.replace(part, weight=1.0)]
    found = [way.estimate(batch, params, Seed(5, 0, 0, step), 1, 1).gradient for step in range(count)]
    return {name: torch.stack([g[name] for g in found]).double() for name in params}


def test_the_estimate_is_unbiased_for_the_smoothed_loss() -> None:
    """Within 5 standard errors, as the estimates themselves spread; h is so large that the plain gradient is not."""
    (part, _), params = problem()
    truth, plain = smoothed(part, params, 1.0), smoothed(part, params, 0.0)
    off = []
    for name, samples in estimates(part, params, 1.0, upper=2, count=3000).items():
        standard = samples.std(0) / len(samples) ** 0.5
        assert ((samples.mean(0) - truth[name]).abs() < 5 * standard).all(), name
        off.append((samples.mean(0) - plain[name]).abs() / standard)
    assert torch.stack(off).max() > 5


def test_more_directions_of_the_upper_half_leave_less_noise_there_and_not_below() -> None:
    """As the loss moves with both halves, P2 = 8 for one u1 cuts most of the noise above and little below."""
    (part, _), params = problem()
    one, eight = (estimates(part, params, 1e-3, upper, 100) for upper in (1, 8))

    def ratio(names: set[str]) -> float:
        after, before = (sum(each[name].var(0).sum().item() for name in names) for each in (eight, one))
        return after / before

    assert ratio(HIGH) < 0.6
    assert ratio(HIGH) < ratio(LOW)


@pytest.mark.parametrize(("names", "lower", "upper"), [(LOW, 2 * P1, 2 * P1), (HIGH, 1, 2 * P1 * P2)])
def test_a_half_that_is_not_perturbed_is_not_run_twice_on_the_same(names: set[str], lower: int, upper: int) -> None:
    batch, params = problem()
    runs = {"lower": 0, "upper": 0}

    def counting(part: Part) -> Part:
        assert part.halves is not None
        whole = part.halves(1)

        def count(name: str, value: Any) -> Any:
            runs[name] += 1
            return value

        halves = Halves(lambda p: count("lower", whole.lower(p)), lambda p, h: count("upper", whole.upper(p, h)))
        return dataclasses.replace(part, halves=lambda cut: halves)

    rest = params.keys() - names
    way = gradient()
    held = estimate_with_exact(way, [counting(batch[0])], params, rest, SEED, P1)
    assert runs == {"lower": lower, "upper": upper}
    assert held.cost.forwards(1.0) == 1 + lower * 0.5 + upper * 0.5  # one pass for what is exact
    assert len(held.slopes) == P1 * P2
    moving = {name: params[name] for name in names}
    assert same(way.combine(held.slopes, SEED, moving), {name: held.gradient[name] for name in names})
