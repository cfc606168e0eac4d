"""Exact gradients for a few tensors near the loss, slopes for the rest. Which tensors those are is not decided here."""

from collections.abc import Collection

import torch

from spry_app.autodiff.costs import Cost
from spry_app.autodiff.directions import Seed, Tensors
from spry_app.autodiff.gradients import GRADIENTS, Estimate, Gradient
from spry_app.autodiff.slopes import Batch, Halves, Part


def estimate_with_exact(
    gradient: Gradient,
    batch: Batch,
    params: Tensors,
    exact: Collection[str],
    seed: Seed,
    directions: int,
    at_once: int = 1,
) -> Estimate:
    """`gradient` for the tensors of `params` that are not in `exact`, backpropagation for those that are.

    Only tensors between `exact` and the loss are kept for the backward pass, so for a classification head this costs
    one forward pass and no stored activations of the network. The slopes are along directions of the rest alone: the
    exact tensors add nothing to the variance of the estimate, which grows with the number of perturbed values.
    """
    known = {name: value for name, value in params.items() if name in exact}
    rest = {name: value for name, value in params.items() if name not in exact}
    parts = [
        estimator.estimate(_holding(batch, fixed), free, seed, directions, at_once)
        for estimator, free, fixed in (
            (GRADIENTS["backprop"], known, rest),
            (gradient, rest, known),
        )
        if free
    ]
    merged = {name: value for part in parts for name, value in part.gradient.items()}
    # The way back through what lies between the exact tensors and the loss is too short to count.
    costs = [part.cost for part in parts]
    cost = Cost(sum(c.passes for c in costs), costs[-1].sweeps if rest else 0.0, costs[-1].stretches)
    return Estimate(parts[-1].loss, {name: merged[name] for name in params}, parts[-1].slopes, cost)


def _holding(batch: Batch, fixed: Tensors) -> Batch:
    def hold(part: Part) -> Part:
        def objective(free: Tensors) -> torch.Tensor:
            return part.objective(fixed | free)

        def halves(cut: int) -> Halves:
            assert part.halves is not None
            whole = part.halves(cut)
            return Halves(
                lambda free: whole.lower(fixed | free), lambda free, hidden: whole.upper(fixed | free, hidden)
            )

        return Part(objective, part.weight, halves if part.halves else None)

    return [hold(part) for part in batch]
