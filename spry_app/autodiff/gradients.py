"""How a client gets a gradient, as a table of interchangeable ways. Never an optimizer's step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from spry_app.autodiff.checkpointing import checkpointing
from spry_app.autodiff.directions import Seed, Tensors, direction, weighted_sum
from spry_app.autodiff.slopes import Batch, SlopeRule, central_difference, forward_mode, one_sided_difference


@dataclass(frozen=True)
class Estimate:
    """What one batch gave: its loss, a gradient (fp32, CPU) and the slopes it was made from (none for backprop)."""

    loss: float
    gradient: Tensors
    slopes: tuple[float, ...]


@dataclass(frozen=True)
class Gradient:
    """One way to a gradient: `estimate(batch, params, seed, K, at_once)`; `forwards(K)` is its cost in forward passes.

    at_once: how many of the K directions may share a pass (see slopes.SlopeRule).
    """

    name: str
    estimate: Callable[[Batch, Tensors, Seed, int, int], Estimate]
    slopes: SlopeRule | None
    forwards: Callable[[int], float]


def _from_slopes(name: str, rule: SlopeRule, forwards: Callable[[int], float]) -> Gradient:
    """g = mean_k slope_k direction_k, an unbiased estimate of the gradient (arXiv 2405.15551, equation 2)."""

    def estimate(batch: Batch, params: Tensors, seed: Seed, directions: int, at_once: int = 1) -> Estimate:
        loss, slopes = rule(batch, params, (direction(seed, k, params) for k in range(directions)), at_once)
        return Estimate(loss, weighted_sum(slopes, seed, params), tuple(slopes))

    return Gradient(name, estimate, rule, forwards)


def _checkpointed_backprop(batch: Batch, params: Tensors, seed: Seed, directions: int, at_once: int = 1) -> Estimate:
    """The exact gradient; the objective keeps its checkpoints and computes the rest again (arXiv 1604.06174)."""
    with checkpointing():
        return _backprop(batch, params, seed, directions, at_once)


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
    return Estimate(torch.stack(losses).sum().item(), {name: grad.cpu() for name, grad in total.items()}, ())


GRADIENTS: dict[str, Gradient] = {
    row.name: row
    for row in (
        _from_slopes("forward-mode", forward_mode, lambda k: 2 * k),
        # h of arXiv 2305.17333 and 2402.05926.
        _from_slopes("central-difference", central_difference(1e-3), lambda k: 2 * k),
        # h of arXiv 2301.12195 for fp32.
        _from_slopes("one-sided-difference", one_sided_difference(1e-4), lambda k: k + 1),
        # The backward pass costs about two forward passes.
        Gradient("backprop", _backprop, None, lambda k: 3),
        Gradient("checkpointed-backprop", _checkpointed_backprop, None, lambda k: 4),
    )
}
