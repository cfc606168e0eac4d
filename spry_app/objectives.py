"""A model, a task and some rows, as a function of the trainable tensors; and its score. Used by client and server."""

import functools
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from spry_app.autodiff.bisection import Chain
from spry_app.autodiff.directions import Seed, Tensors
from spry_app.autodiff.gradients import Gradient
from spry_app.autodiff.slopes import Halves, Objective, Part, forward_mode
from spry_app.errors import SpryError
from spry_app.models import AdaptedModel, Entering
from spry_app.models.positions import positions
from spry_app.prefix import may_start_at
from spry_app.protocol import Score
from spry_app.tasks import Encoded

Prefix = Callable[[Sequence[Sequence[int]]], list[Entering | None]]
"""Micro-batches -> where the pass of each begins."""


def objective(
    adapted: AdaptedModel, rows: Encoded, indices: Sequence[int], seed: Seed, entering: Entering | None = None
) -> Objective:
    """Their task's mean loss of some rows: a deterministic function, since dropout masks depend on `seed` alone."""
    inputs, targets, masks = rows.inputs(indices), rows.aims(indices), _masks(seed)

    def loss_of(params: Tensors) -> Tensor:
        return rows.task.loss(adapted.bound(params, masks, entering), inputs, targets)

    return loss_of


def halves(
    adapted: AdaptedModel, rows: Encoded, indices: Sequence[int], seed: Seed, entering: Entering | None, cut: int
) -> Halves:
    """`objective` in two: up to block `cut`, and from there (or `entering`, where that is above it) to the loss."""
    inputs, targets, masks = rows.inputs(indices), rows.aims(indices), _masks(seed)
    depth = max(cut, entering.depth) if entering else cut

    def lower(params: Tensors) -> Tensor:
        return adapted.prefix(inputs, cut, params, masks, entering).hidden

    def upper(params: Tensors, hidden: Tensor) -> Tensor:
        return rows.task.loss(adapted.bound(params, masks, Entering(depth, hidden)), inputs, targets)

    return Halves(lower, upper)


def chain(
    adapted: AdaptedModel,
    rows: Encoded,
    indices: Sequence[int],
    seed: Seed,
    entering: Entering | None,
    names: Collection[str],
) -> Chain:
    """`objective` block by block, from the lowest one with a tensor of these names."""
    inputs, targets, masks = rows.inputs(indices), rows.aims(indices), _masks(seed)

    def loss(params: Tensors, here: Entering | None) -> Tensor:
        return rows.task.loss(adapted.bound(params, masks, here), inputs, targets)

    return adapted.chain(inputs, names, loss, masks, entering)


def _masks(seed: Seed) -> int:
    return hash((seed.run, seed.round, seed.client, seed.step)) & (2**63 - 1)


def batch_of(
    adapted: AdaptedModel,
    rows: Encoded,
    indices: Sequence[int],
    micro_batch: int,
    seed: Seed,
    prefix: Prefix | None = None,
) -> list[Part]:
    """The rows as micro-batches whose weighted losses add up to the mean over all of them, row by row or term by term
    (tasks.Encoded.terms); 0 means one part.
    """
    size, order = micro_batch or len(indices), rows.by_length(indices)
    slices = [order[start : start + size] for start in range(0, len(order), size)]
    starts, total = prefix(slices) if prefix else [None] * len(slices), rows.weight(order)
    return [
        Part(
            objective(adapted, rows, part, seed, start),
            rows.weight(part) / total,
            functools.partial(halves, adapted, rows, part, seed, start),
            functools.partial(chain, adapted, rows, part, seed, start),
        )
        for part, start in zip(slices, starts, strict=True)
    ]


def refuse_too_long(adapted: AdaptedModel, rows: Encoded, where: str) -> None:
    """Raises SpryError for rows of more tokens than the model has places for."""
    most, longest = positions(adapted.model), max(map(rows.length, range(len(rows))), default=0)
    if most is not None and longest > most:
        family = adapted.model.config.model_type
        raise SpryError(
            f"{where} have up to {longest} tokens, and this {family} model has places for {most}: lower "
            f"data.max-length to {most} at most, or take another model.name."
        )


def head_cut(
    gradient: Gradient, adapted: AdaptedModel, rows: Encoded, exact: Collection[str], trained: Collection[str]
) -> int | None:
    """The block number of the head, if a step may be cut there for tensors whose gradient is `exact` (exact.py).

    None unless `gradient` is by forward mode, some other of the tensors `trained` is in a block, and passes may begin
    at the head.
    """
    if gradient.slopes is not forward_mode or not exact:
        return None
    top, depths = len(adapted.blocks), adapted.depths()
    inside = any(depths[name] < top for name in trained if name not in exact)
    return top if inside and may_start_at(adapted, rows, top) else None


@torch.no_grad()
def score(
    adapted: AdaptedModel,
    rows: Encoded,
    batch_size: int,
    prefix: Prefix | None = None,
    done: Callable[[int], None] | None = None,
) -> Score:
    """What the task makes of the model with the tensors now loaded in it, on all rows. Nothing is trained.

    done: told after each batch how many rows it had.
    """
    total: dict[str, float] = {"loss": 0.0, "examples": 0, **dict.fromkeys(rows.task.sums, 0)}
    for part in rows.parts(batch_size):
        model = adapted.bound({}, entering=prefix([part])[0] if prefix else None)
        for name, value in rows.task.judge(model, rows, part).items():
            total[name] += value
        if done:
            done(len(part))
    loss, examples = total.pop("loss"), int(total.pop("examples"))
    return Score(loss=loss, sums=total, examples=examples)
