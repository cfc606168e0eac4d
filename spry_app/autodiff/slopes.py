"""How much the loss changes along a direction: by forward mode or by differences. Never how directions are drawn, or
what is done with the slopes.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from spry_app.autodiff.bisection import Chain
from spry_app.autodiff.directions import Tensors
from spry_app.autodiff.duals import dual, split, wide
from spry_app.autodiff.forward_rules import ForwardRules

Objective = Callable[[Tensors], Tensor]
"""Deterministic: trainable tensors, which replace the model's by name, -> scalar loss (mean over the examples)."""


class ForwardModeError(RuntimeError):
    """Forward mode gave no slope, where one was asked for."""


@dataclass(frozen=True)
class Halves:
    """An objective cut in two: loss = upper(tensors, lower(tensors)), each deterministic. Hidden states go on."""

    lower: Callable[[Tensors], Tensor]
    upper: Callable[[Tensors, Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """One micro-batch; the weights of a batch sum to 1 (examples of the part / examples of the batch).

    halves: the objective cut below the block of that number; None where it cannot be cut. chain: the same block by
    block, from the lowest one with a tensor of these names.
    """

    objective: Objective
    weight: float
    halves: Callable[[int], Halves] | None = None
    chain: Callable[[Collection[str]], Chain] | None = None


Batch = Sequence[Part]


class SlopeRule(Protocol):
    """(batch, parameters, directions) -> (loss of the batch, one slope a direction).

    at_once: directions that may share a pass: faster, and more memory. A rule that cannot share them ignores it.
    """

    def __call__(
        self, batch: Batch, params: Tensors, directions: Iterable[Tensors], at_once: int = 1
    ) -> tuple[float, list[float]]: ...


def forward_mode(
    batch: Batch, params: Tensors, directions: Iterable[Tensors], at_once: int = 1
) -> tuple[float, list[float]]:
    """Exact slopes, no autograd graph (arXiv 2202.08587; 2405.15551).

    A direction alone costs two forward passes; n that share a pass cost 1 + n, and only one below the lowest perturbed
    tensor. A direction may leave out tensors, which then stay put. Raises ForwardModeError where the loss has no
    tangent.
    """
    losses: list[Tensor] = []
    slopes: list[Tensor] = []
    for chunk in chunks(directions, at_once):
        pairs = [with_tangents(part.objective, params, chunk) for part in batch]
        losses.append(mean_of(batch, [loss for loss, _ in pairs]))
        slopes += mean_of(batch, [tangents for _, tangents in pairs]).unbind()
    return numbers(losses[:1], slopes)


def with_tangents(function: Objective, params: Tensors, directions: Sequence[Tensors]) -> tuple[Tensor, Tensor]:
    """The value of `function`, which need not be a scalar, and its tangents along n directions, shape (n, *value's).

    They share a pass. Raises ForwardModeError, see `forward_mode`.
    """
    if torch.is_inference_mode_enabled():
        raise ForwardModeError(
            "forward mode was called under torch.inference_mode(), which drops every tangent without a word; "
            "use torch.no_grad() instead"
        )
    with torch.no_grad(), ForwardRules():
        return (_one if len(directions) == 1 else _together)(function, params, directions)


def _one(function: Objective, params: Tensors, directions: Sequence[Tensors]) -> tuple[Tensor, Tensor]:
    (direction,) = directions
    with fwAD.dual_level():
        duals = {name: _with_tangent(tensor, direction.get(name)) for name, tensor in params.items()}
        value, tangent = _value_and_tangent(function(duals))
    return value, tangent.unsqueeze(0)


def _together(function: Objective, params: Tensors, directions: Sequence[Tensors]) -> tuple[Tensor, Tensor]:
    """One primal, n tangents."""
    moving = {name: params[name].detach() for name in directions[0]}
    still = {name: tensor for name, tensor in params.items() if name not in moving}
    stacked = {name: torch.stack([v[name].to(tensor) for v in directions]) for name, tensor in moving.items()}

    def along(tangents: Tensors) -> tuple[Tensor, Tensor]:
        value, tangent, *_ = torch.func.jvp(lambda own: function(still | own), (moving,), (tangents,))
        return value, tangent

    both: tuple[Tensor, Tensor] = torch.func.vmap(along, randomness="same")(stacked)
    return both[0][0], both[1]


def chunks(directions: Iterable[Tensors], size: int) -> Iterator[list[Tensors]]:
    """So many at a time, each drawn when its turn comes."""
    iterator = iter(directions)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def central_difference(h: float) -> SlopeRule:
    """[L(w + h v) - L(w - h v)] / (2 h), two forward passes a direction (arXiv 2305.17333, algorithm 1).

    The loss is the mean of the losses measured, L(w) + O(h^2).
    """

    def rule(
        batch: Batch, params: Tensors, directions: Iterable[Tensors], at_once: int = 1
    ) -> tuple[float, list[float]]:
        losses, slopes = [], []
        for direction in directions:
            above, below = (_losses(batch, moved(params, direction, step)) for step in (h, -h))
            losses += [mean_of(batch, above), mean_of(batch, below)]
            slopes.append(mean_of(batch, [a - b for a, b in zip(above, below, strict=True)]) / (2 * h))
        return numbers(losses, slopes)

    return rule


def one_sided_difference(h: float) -> SlopeRule:
    """[L(w + h v) - L(w)] / h, one forward pass a direction and one more (arXiv 2301.12195, 2308.13894)."""

    def rule(
        batch: Batch, params: Tensors, directions: Iterable[Tensors], at_once: int = 1
    ) -> tuple[float, list[float]]:
        start = _losses(batch, params)
        slopes = []
        for direction in directions:
            above = _losses(batch, moved(params, direction, h))
            slopes.append(mean_of(batch, [a - b for a, b in zip(above, start, strict=True)]) / h)
        return numbers([mean_of(batch, start)], slopes)

    return rule


def moved(params: Tensors, direction: Tensors, step: float) -> Tensors:
    """params + step * direction, in the format and place of `params`."""
    return {
        name: tensor if name not in direction else tensor.detach().add(direction[name].to(tensor), alpha=step)
        for name, tensor in params.items()
    }


def _with_tangent(tensor: Tensor, tangent: Tensor | None) -> Tensor:
    return dual(tensor.detach(), None if tangent is None else tangent.to(tensor))


def _value_and_tangent(value: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = split(value)
    if tangent is None:
        raise ForwardModeError(
            "the loss has no tangent: either it does not depend on the perturbed tensors, or a module on the way lost "
            "it (a custom kernel, reentrant checkpointing); spry_app.autodiff.self_check names the module. gradient = "
            '"central-difference" needs no tangents'
        )
    return primal, tangent


def _losses(batch: Batch, params: Tensors) -> list[Tensor]:
    with torch.no_grad():
        return [part.objective(params) for part in batch]


def mean_of(batch: Batch, values: Sequence[Tensor]) -> Tensor:
    """The batch's value from those of its parts; stays on the device, so that no part waits for another."""
    return torch.stack([wide(value) * part.weight for part, value in zip(batch, values, strict=True)]).sum(0)


def numbers(losses: list[Tensor], slopes: list[Tensor]) -> tuple[float, list[float]]:
    """The one point where the host waits for the device."""
    loss, *numbers = torch.stack([torch.stack(losses).mean(), *slopes]).tolist()
    return loss, numbers
