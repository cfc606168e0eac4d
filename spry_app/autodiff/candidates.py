"""Directions chosen among candidates, as many as a variance asks for (FwdLLM). How slopes are measured is not here."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spry_app.autodiff.costs import Cost
from spry_app.autodiff.directions import Seed, Tensors, direction
from spry_app.autodiff.gradients import Estimate, Gradient
from spry_app.autodiff.slopes import Batch


def nearest(base: Gradient, guide: Tensors, candidates: int, threshold: float) -> Gradient:
    """`base`, along those of the directions 0 .. `candidates` - 1 that are nearest to `guide` (arXiv 2308.13894).

    At least two directions are used, then one more at a time until the variance of the estimate, as a mean over its
    numbers, is at most `threshold` (0 sets none), or K are used. One direction is in memory at a time, beside the sum.
    guide: the last global update; tensors that it lacks count as zero. Choosing makes the estimate biased towards the
    guide.

    Our reading: nearness is the absolute cosine, as v and -v give the same estimate; the variance is the client's own,
    over the directions of one batch, and not that of a pool which the server keeps.
    """
    rule = base.slopes
    if rule is None:
        raise ValueError(f"directions can only be chosen for a gradient made of slopes; {base.name} has none")

    def ranked(seed: Seed, params: Tensors) -> list[int]:
        near = [_nearness(direction(seed, k, params), guide) for k in range(candidates)]
        return sorted(range(candidates), key=lambda k: -near[k])

    def estimate(batch: Batch, params: Tensors, seed: Seed, directions: int, at_once: int = 1) -> Estimate:
        losses, slopes, total = [], list[float](), _Sum(params)
        for k in ranked(seed, params)[:directions]:
            v = direction(seed, k, params)
            loss, (slope,) = rule(batch, params, [v], 1)
            losses.append(loss)
            slopes.append(slope)
            total.add(slope, v)
            if threshold and total.count > 1 and total.variance() <= threshold:
                break
        cost = _times(base.cost(1, 1), len(slopes))
        return Estimate(sum(losses) / len(losses), total.mean(), tuple(slopes), cost)

    def combine(slopes: Sequence[float], seed: Seed, params: Tensors) -> Tensors:
        total = _Sum(params)
        for k, slope in zip(ranked(seed, params), slopes, strict=False):
            total.add(slope, direction(seed, k, params))
        return total.mean()

    return Gradient(base.name, estimate, rule, lambda k, at_once: _times(base.cost(1, 1), k), combine)


def _nearness(v: Tensors, guide: Tensors) -> float:
    """|cosine| times the length of the guide, which is the same for all candidates."""
    along = sum(_dot(v[name], guide[name]) for name in v if name in guide)
    return abs(along) / math.sqrt(sum(_dot(value, value) for value in v.values()))


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.vdot(a.flatten().double(), b.flatten().double()))


def _times(cost: Cost, count: int) -> Cost:
    return Cost(cost.passes * count, cost.sweeps * count)


class _Sum:
    """Sum of slope * direction, and what the variance of its mean needs."""

    def __init__(self, like: Tensors) -> None:
        self.count, self._squares = 0, 0.0
        self._total = {name: torch.zeros(tensor.shape) for name, tensor in like.items()}

    def add(self, slope: float, v: Tensors) -> None:
        """Takes v over: it is scaled in place."""
        self.count += 1
        for name, value in v.items():
            self._total[name] += value.mul_(slope)  # two rounded operations, on every machine
            self._squares += _dot(value, value)

    def variance(self) -> float:
        """Of the mean, unbiased, averaged over all numbers of all tensors."""
        n, of_sum = self.count, sum(_dot(value, value) for value in self._total.values())
        numbers = sum(value.numel() for value in self._total.values())
        return (self._squares - of_sum / n) / (n * (n - 1) * numbers)

    def mean(self) -> Tensors:
        return {name: value / self.count for name, value in self._total.items()}
