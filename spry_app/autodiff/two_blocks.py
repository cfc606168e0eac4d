"""Slopes of a model cut in two, whose upper half is perturbed more often than its lower one (FedSPZO). Where it is cut
is decided elsewhere.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spry_app.autodiff.costs import Cost
from spry_app.autodiff.directions import Seed, Tensors, direction, weighted_sum
from spry_app.autodiff.gradients import Estimate, Gradient
from spry_app.autodiff.slopes import Batch, Part, central_difference, mean_of, moved, numbers


def two_blocks(h: float, upper: int, below: Collection[str], cut: int, share: float) -> Gradient:
    """Central differences over a step of h, `upper` (P2) of them on what one direction of the lower half leaves
    (arXiv 2502.10239v2).

    below: names of the tensors that lie below block number `cut`; share: part of the blocks that do. K is P1: for each
    of the K directions u1 of the lower half its outputs at w1 + h u1 and w1 - h u1 are kept, and `upper` directions u2
    of the upper half are run on them, w2 + h u2 on the first and w2 - h u2 on the second. The difference over 2 h is a
    slope along (u1, u2). u1 is direction number p1 of the seed, u2 number p1 * P2 + p2; the estimate of each half is
    the mean of slope * direction. The loss is the mean of the losses measured.

    Our reading: losses are taken at (w1 + h u1, w2 + h u2) and (w1 - h u1, w2 - h u2), not with mixed signs. Parts come
    one after the other, so that two outputs are in memory. at_once is ignored.
    """
    way = _TwoBlocks(h, upper, below, cut, share)
    return Gradient(
        "two-blocks",
        way.estimate,
        central_difference(h),
        lambda k, _: _cost(2 * k, 2 * k * upper, share),
        way.combine,
        slopes_per_direction=upper,
        cut=cut,
    )


@dataclass(frozen=True)
class _TwoBlocks:
    """The arguments of `two_blocks`."""

    h: float
    upper: int
    below: Collection[str]
    cut: int
    share: float

    def estimate(self, batch: Batch, params: Tensors, seed: Seed, directions: int, at_once: int = 1) -> Estimate:
        low, high = self._halves_of(params)
        # What is not perturbed gives the same again: one lower pass, or one upper pair for each direction, is enough.
        pairs = self.upper if high else 1
        with torch.no_grad():
            of_parts = [list(self._measure(part, params, seed, directions, pairs)) for part in batch]
        losses, slopes = list[Tensor](), list[Tensor]()
        for sides in zip(*of_parts, strict=True):
            losses += [mean_of(batch, side) for side in zip(*sides, strict=True)]
            slope = mean_of(batch, [above - under for above, under in sides]) / (2 * self.h)
            slopes += [slope] * (self.upper // pairs)
        loss, values = numbers(losses, slopes)
        cost = _cost(2 * directions if low else 1, 2 * directions * pairs, self.share)
        return Estimate(loss, self.combine(values, seed, params), tuple(values), cost)

    def combine(self, slopes: Sequence[float], seed: Seed, params: Tensors) -> Tensors:
        """The gradient that the slopes of all (p1, p2) stand for, p2 running fastest."""
        low, high = self._halves_of(params)
        starts = range(0, len(slopes), self.upper)
        means = [sum(slopes[start : start + self.upper]) / self.upper for start in starts]
        both = weighted_sum(means, seed, low) | weighted_sum(slopes, seed, high)
        return {name: both[name] for name in params}

    def _measure(
        self, part: Part, params: Tensors, seed: Seed, directions: int, pairs: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The losses on either side, in the order of the slopes."""
        assert part.halves is not None, "the objective cannot be cut"
        halves, steps = part.halves(self.cut), (self.h, -self.h)
        low, high = self._halves_of(params)
        ends = [] if low else [halves.lower(params)] * 2
        for p1 in range(directions):
            if low:
                u1 = direction(seed, p1, low)
                ends = [halves.lower(moved(params, u1, step)) for step in steps]
            for p2 in range(pairs):
                u2 = direction(seed, p1 * self.upper + p2, high)
                above, under = (
                    halves.upper(moved(params, u2, step), end) for step, end in zip(steps, ends, strict=True)
                )
                yield above, under

    def _halves_of(self, params: Tensors) -> tuple[Tensors, Tensors]:
        low = {name: value for name, value in params.items() if name in self.below}
        return low, {name: value for name, value in params.items() if name not in low}


def _cost(lower: int, upper: int, share: float) -> Cost:
    return Cost(0.0, stretches=((lower, 0.0, share), (upper, share, 1.0)))
