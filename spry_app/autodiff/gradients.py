"""How a client gets a gradient, as a table of interchangeable ways. Never an optimizer's step."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spry_app.autodiff.bisection import WayBack
from spry_app.autodiff.checkpointing import checkpointing
from spry_app.autodiff.costs import Cost
from spry_app.autodiff.directions import Seed, Tensors, direction, weighted_sum
from spry_app.autodiff.slopes import Batch, SlopeRule, central_difference, forward_mode, one_sided_difference

CostOf = Callable[[int, int], Cost]
Combine = Callable[[Sequence[float], Seed, Tensors], Tensors]


@dataclass(frozen=True)
class Estimate:
    """What one batch gave: loss, gradient (fp32, CPU), the slopes it was made from (none for backprop), its cost."""

    loss: float
    gradient: Tensors
    slopes: tuple[float, ...]
    cost: Cost


@dataclass(frozen=True)
class Gradient:
    """One way to a gradient: `estimate(batch, params, seed, K, at_once)`; `cost(K, at_once)` is the most it may take.

    at_once: how many of the K directions may share a pass (see slopes.SlopeRule). combine: (slopes, seed, params) ->
    the gradient that they stand for; a server that was sent slopes gets the bits of the client that measured them.
    slopes_per_direction: how many `estimate` and `combine` count for each of the K. cut: number of the block below
    which every part of the batch must have halves; None where it takes whole objectives.
    """

    name: str
    estimate: Callable[[Batch, Tensors, Seed, int, int], Estimate]
    slopes: SlopeRule | None
    cost: CostOf
    combine: Combine = weighted_sum
    slopes_per_direction: int = 1
    cut: int | None = None


def _from_slopes(name: str, rule: SlopeRule, cost: CostOf, combine: Combine = weighted_sum) -> Gradient:
    """g = mean_k slope_k direction_k, an unbiased estimate of the gradient (arXiv 2405.15551, equation 2)."""

    def estimate(batch: Batch, params: Tensors, seed: Seed, directions: int, at_once: int = 1) -> Estimate:
        loss, slopes = rule(batch, params, (direction(seed, k, params) for k in range(directions)), at_once)
        return Estimate(loss, combine(slopes, seed, params), tuple(slopes), cost(directions, at_once))

    return Gradient(name, estimate, rule, cost, combine)


def _checkpointed_backprop(batch: Batch, params: Tensors, seed: Seed, directions: int, at_once: int = 1) -> Estimate:
    """The exact gradient; the objective keeps its checkpoints and computes the rest again (arXiv 1604.06174)."""
    with checkpointing():
        return dataclasses.replace(_backprop(batch, params, seed, directions, at_once), cost=_CHECKPOINTED)


def _backprop(batch: Batch, params: Tensors, seed: Seed, directions: int, at_once: int = 1) -> Estimate:
    """The exact gradient; only the first two arguments are used."""
    leaves = {name: tensor.detach().requires_grad_(True) for name, tensor in params.items()}
    # Fresh tensors: those of autograd.grad may share memory with one another.
    total = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in params.items()}
    losses = []
    for part in batch:
        with torch.enable_grad():
            loss = part.objective(leaves)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        for name, grad in zip(leaves, grads, strict=True):
            total[name].add_(grad, alpha=part.weight)
        losses.append(loss.detach().float() * part.weight)
    gradient = {name: grad.cpu() for name, grad in total.items()}
    return Estimate(torch.stack(losses).sum().item(), gradient, (), _BACKPROP)


def _bisected_backprop(batch: Batch, params: Tensors, seed: Seed, directions: int, at_once: int = 1) -> Estimate:
    """The exact gradient, of parts that go block by block; a few of them are kept, the others computed again."""
    total = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in params.items()}
    losses, sweeps = list[Tensor](), 0.0
    for part in batch:
        assert part.chain is not None, "the objective does not go block by block"
        way = WayBack(part.chain(params), params, total, part.weight)
        losses.append(way.loss().float() * part.weight)
        sweeps = 1 + way.again / max(1, len(way.chain.blocks))
    gradient = {name: grad.cpu() for name, grad in total.items()}
    return Estimate(torch.stack(losses).sum().item(), gradient, (), Cost(passes=1, sweeps=sweeps))


def central(h: float) -> Gradient:
    """Central differences over a step of h."""
    return _from_slopes("central-difference", central_difference(h), lambda k, _: Cost(2 * k))


def one_sided(h: float) -> Gradient:
    """One-sided differences over a step of h."""
    return _from_slopes("one-sided-difference", one_sided_difference(h), lambda k, _: Cost(k + 1))


# The base is frozen, so going back takes products for the gradients of the inputs alone: one sweep, not two.
_BACKPROP, _CHECKPOINTED = Cost(passes=1, sweeps=1), Cost(passes=1, sweeps=2)
_BISECTED = Cost(passes=1, sweeps=4)
"""Of 64 blocks; those of 6 take 3.5 passes in all, of 24 and 32 about 4.5."""

GRADIENTS: dict[str, Gradient] = {
    row.name: row
    for row in (
        _from_slopes("forward-mode", forward_mode, lambda k, at_once: Cost(math.ceil(k / at_once), k)),
        # h of arXiv 2305.17333 and 2402.05926.
        central(1e-3),
        # h of arXiv 2301.12195 for fp32.
        one_sided(1e-4),
        Gradient("backprop", _backprop, None, lambda k, _: _BACKPROP),
        Gradient("checkpointed-backprop", _checkpointed_backprop, None, lambda k, _: _CHECKPOINTED),
        Gradient("bisected-backprop", _bisected_backprop, None, lambda k, _: _BISECTED),
    )
}
