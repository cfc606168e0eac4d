"""Exact gradients for a few tensors near the loss, slopes for the rest. Which tensors those are is not decided here."""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from spry_app.autodiff.bisection import Chain
from spry_app.autodiff.costs import Cost
from spry_app.autodiff.directions import Seed, Tensors, direction
from spry_app.autodiff.duals import wide
from spry_app.autodiff.gradients import GRADIENTS, Estimate, Gradient
from spry_app.autodiff.slopes import Batch, Halves, Part, chunks, forward_mode, mean_of, numbers, with_tangents


def estimate_with_exact(
    gradient: Gradient,
    batch: Batch,
    params: Tensors,
    exact: Collection[str],
    seed: Seed,
    directions: int,
    at_once: int = 1,
    cut: int | None = None,
) -> Estimate:
    """`gradient` for the tensors of `params` that are not in `exact`, backpropagation for those that are.

    Only tensors between `exact` and the loss are kept for the backward pass, so for a classification head this stores
    no activations of the network. The slopes are along directions of the rest alone: the exact tensors add nothing to
    the variance of the estimate, which grows with the number of perturbed values.

    cut: number of a block below which all parts may be cut, and which is above a tensor of the rest and below all of
    `exact`. Forward mode, and it alone, then gives both from the same passes. None: one forward pass more.
    """
    known = {name: value for name, value in params.items() if name in exact}
    rest = {name: value for name, value in params.items() if name not in exact}
    if cut is not None and known and rest:
        assert gradient.slopes is forward_mode, gradient.name
        shared = _from_the_same_passes(gradient, batch, rest, known, cut, seed, directions, at_once)
        return Estimate(shared.loss, {name: shared.gradient[name] for name in params}, shared.slopes, shared.cost)
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


def _from_the_same_passes(
    gradient: Gradient,
    batch: Batch,
    rest: Tensors,
    known: Tensors,
    cut: int,
    seed: Seed,
    directions: int,
    at_once: int,
) -> Estimate:
    """Forward mode up to the cut, where hidden states h have tangents h' along v; from the loss back to there.

    A slope is then <dL/dh, h'> + <dL/dw, v> (the chain rule; the second term is of what of the rest w lies above the
    cut), and what is known exactly is on the way.
    """
    losses, slopes = list[Tensor](), list[Tensor]()
    total = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in known.items()}
    for chunk in chunks((direction(seed, k, rest) for k in range(directions)), at_once):
        # Every chunk has the same exact gradients. No part's is kept: a head may be large, and parts many.
        of_parts = [_through(part, cut, rest, known, chunk, {} if losses else total) for part in batch]
        losses.append(mean_of(batch, [loss for loss, _ in of_parts]))
        slopes += mean_of(batch, [slope for _, slope in of_parts]).unbind()
    loss, values = numbers(losses[:1], slopes)
    estimated = gradient.combine(values, seed, rest)
    return Estimate(loss, estimated | total, tuple(values), gradient.cost(directions, at_once))


def _through(
    part: Part, cut: int, rest: Tensors, known: Tensors, directions: Sequence[Tensors], total: Tensors
) -> tuple[Tensor, Tensor]:
    """The loss of one part, and its slopes along n directions of the rest, shape (n,). Adds the part's share in the
    gradient of what is known to `total`, by those names that it has.
    """
    assert part.halves is not None, "the objective cannot be cut"
    halves = part.halves(cut)
    hidden, tangents = with_tangents(_fixing(halves.lower, known), rest, directions)
    loss, back, above = _back_to(hidden, halves, rest, known)
    slopes = wide(tangents).flatten(1) @ wide(back).flatten()
    for name, grad in above.items():
        if name in rest:
            slopes += torch.stack([(v[name].to(grad) * grad).sum() for v in directions])
        elif name in total:
            total[name].add_(grad.cpu(), alpha=part.weight)
    return loss, slopes


def _back_to(hidden: Tensor, halves: Halves, rest: Tensors, known: Tensors) -> tuple[Tensor, Tensor, Tensors]:
    """The loss, its gradient with respect to hidden states at the cut, and those of the tensors that are above it."""
    start = hidden.detach().requires_grad_(True)
    leaves = {name: tensor.detach().requires_grad_(True) for name, tensor in (rest | known).items()}
    with torch.enable_grad():
        loss = halves.upper(leaves, start)
    back, *grads = torch.autograd.grad(loss, [start, *leaves.values()], allow_unused=True)
    above = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return loss.detach(), back, above


def _fixing(function: Callable[[Tensors], Tensor], fixed: Tensors) -> Callable[[Tensors], Tensor]:
    return lambda free: function(fixed | free)


def _holding(batch: Batch, fixed: Tensors) -> Batch:
    return [_held(part, fixed) for part in batch]


def _held(part: Part, fixed: Tensors) -> Part:
    def halves(cut: int) -> Halves:
        assert part.halves is not None
        whole = part.halves(cut)
        return Halves(_fixing(whole.lower, fixed), lambda free, hidden: whole.upper(fixed | free, hidden))

    def chain(names: Collection[str]) -> Chain:
        assert part.chain is not None
        whole = part.chain(names)
        return dataclasses.replace(
            whole,
            through=lambda free, *rest: whole.through(fixed | free, *rest),
            end=lambda free, hidden: whole.end(fixed | free, hidden),
        )

    return Part(
        _fixing(part.objective, fixed), part.weight, halves if part.halves else None, chain if part.chain else None
    )
