"""Seed -> direction, the same bits on every machine, and sums of directions. Nothing here touches a model or a loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spry_app.autodiff.gaussian import Singles, normals
from spry_app.autodiff.orthogonal import Frame
from spry_app.autodiff.random_words import generator

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Seed:
    """Coordinates of one batch in a run.

    client: number among the clients of the round. sharing: 0 for Gaussian directions of the client's own; else
    directions are orthogonal, and `client` is one of so many who take disjoint parts of one frame, counted from 0.
    """

    run: int
    round: int
    client: int
    step: int
    sharing: int = 0


def direction(seed: Seed, k: int, like: Mapping[str, torch.Tensor]) -> Tensors:
    """Direction number `k` of a batch, fp32 on the CPU, one tensor a name.

    Gaussian (seed.sharing 0): N(0, I). A tensor depends on seed, k, its name and its shape, never on the other tensors
    of `like`, nor on dtype or device. Else a column of an orthogonal frame over all d values of `like`, of length
    sqrt(d): the same columns for all who share the frame, numbers apart (orthogonal.py).
    """
    if seed.sharing:
        frame = _frame(seed, like)
        return _cut(frame.columns({_column(k, seed, frame.dimension): 1.0}), like)
    return {name: torch.from_numpy(_normals(seed, k, name, tensor.shape)) for name, tensor in like.items()}


def weighted_sum(slopes: Sequence[float], seed: Seed, like: Mapping[str, torch.Tensor]) -> Tensors:
    """Forward gradient: the mean over k of slopes[k] * direction(seed, k, like), fp32 on the CPU (arXiv 2405.15551).

    One direction of one tensor is in memory at a time. The same bits on every machine, whatever else is in `like`.
    Orthogonal directions (seed.sharing > 0) are summed in one go. Where those who share a frame fill it, as many slopes
    each, every column counts by how often it was measured, so that the mean over them is the gradient itself.
    """
    if not slopes:
        raise ValueError("weighted_sum got no slopes; at least one is needed")
    if seed.sharing:
        return _cut(_orthogonal_mean(slopes, seed, like), like)
    return {name: torch.from_numpy(_mean(slopes, seed, name, tensor.shape)) for name, tensor in like.items()}


def _mean(slopes: Sequence[float], seed: Seed, name: str, shape: torch.Size) -> Singles:
    total = np.zeros(shape, np.float32)
    for k, slope in enumerate(slopes):
        term = _normals(seed, k, name, shape)
        np.multiply(term, np.float32(slope), out=term)
        np.add(total, term, out=total)
    return np.divide(total, np.float32(len(slopes)), out=total)


def _normals(seed: Seed, k: int, name: str, shape: torch.Size) -> Singles:
    coordinates = f"{seed.run} {seed.round} {seed.client} {seed.step} {k} {name}"
    return normals(generator(coordinates, b"spry direction"), math.prod(shape)).reshape(shape)


def _orthogonal_mean(slopes: Sequence[float], seed: Seed, like: Mapping[str, torch.Tensor]) -> Singles:
    frame = _frame(seed, like)
    laps, rest = divmod(len(slopes) * seed.sharing, frame.dimension)
    weights: dict[int, float] = {}
    for k, slope in enumerate(slopes):
        column = _column(k, seed, frame.dimension)
        last = (column - laps * frame.dimension // _cycle(seed, frame.dimension)) % frame.dimension
        times = laps + (last < rest)  # by all who share the frame
        part = seed.sharing / (times * frame.dimension) if laps else 1 / len(slopes)
        weights[column] = weights.get(column, 0.0) + slope * part
    return frame.columns(weights)


def _column(k: int, seed: Seed, dimension: int) -> int:
    """Those who share a frame take its columns in turns, lap after lap. Where a client would come to its own again, all
    move on by one, so that nobody measures a column twice before all.
    """
    number = k * seed.sharing + seed.client
    return (number + number // _cycle(seed, dimension)) % dimension


def _cycle(seed: Seed, dimension: int) -> int:
    return math.lcm(seed.sharing, dimension)


def _frame(seed: Seed, like: Mapping[str, torch.Tensor]) -> Frame:
    """Of a step of a round, over these tensors."""
    dimension = sum(tensor.numel() for tensor in like.values())
    return Frame(f"{seed.run} {seed.round} {seed.step} {' '.join(sorted(like))}", dimension)


def _cut(values: Singles, like: Mapping[str, torch.Tensor]) -> Tensors:
    """A frame's values, which go by the names of the tensors in their order, as those tensors."""
    flat, found = torch.from_numpy(values), Tensors()
    start = 0
    for name in sorted(like):
        end = start + like[name].numel()
        found[name], start = flat[start:end].reshape(like[name].shape), end
    return {name: found[name] for name in like}
