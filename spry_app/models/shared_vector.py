"""One vector of coordinates for all of LoRA's tensors, and the maps from the one to the others. What is trained, saved
and agreed upon is not decided here.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spry_app.autodiff.directions import Tensors
from spry_app.models.frames import hadamard, signs, words
from spry_app.models.units import COORDINATES


class SharedVector(nn.ParameterList, ABC):
    """A vector in chunks, and its map onto all of LoRA's tensors, one after the other."""

    def __init__(self, chunks: list[Tensor], start: Tensors, maps: Tensors) -> None:
        """start: name of each tensor -> theta0. maps: what its part of P is made of."""
        super().__init__([nn.Parameter(chunk) for chunk in chunks])
        self.names = tuple(start)
        for number, name in enumerate(self.names):
            self.register_buffer(f"start_{number}", start[name], persistent=False)
            self.register_buffer(f"map_{number}", maps[name], persistent=False)

    def expand(self, params: Tensors) -> Tensors:
        """With the tensors moved by these coordinates, in place of the coordinates; those not given are as loaded."""
        own = [f"{COORDINATES}.{number}" for number in range(len(self))]
        if params.keys().isdisjoint(own):
            return params
        others = {name: value for name, value in params.items() if name not in own}
        return others | self.tensors(torch.cat([params.get(name, self[i]) for i, name in enumerate(own)]))

    def tensors(self, vector: Tensor) -> Tensors:
        """theta0 + P vector."""
        spread, found = self.spread(vector), dict[str, Tensor]()
        for number, name in enumerate(self.names):
            start: Tensor = getattr(self, f"start_{number}")
            found[name] = start + self.part(spread, getattr(self, f"map_{number}"), start.numel()).view(start.shape)
        return found

    @abstractmethod
    def spread(self, vector: Tensor) -> Tensor:
        """What is computed once for all tensors."""

    @abstractmethod
    def part(self, spread: Tensor, map: Tensor, count: int) -> Tensor:
        """The `count` numbers of one tensor."""


class Picked(SharedVector):
    """Every number is one coordinate, over the root of how many it stands for, so that P' P = I."""

    def __init__(self, chunks: list[Tensor], start: Tensors, maps: Tensors) -> None:
        super().__init__(chunks, start, maps)
        size = sum(chunk.numel() for chunk in chunks)
        uses = torch.bincount(torch.cat(list(maps.values())), minlength=size)
        self.register_buffer("scale", uses.to(chunks[0].dtype).rsqrt(), persistent=False)

    @staticmethod
    def maps(seed: int, counts: Mapping[str, int], size: int) -> Tensors:
        """For each number, which coordinate it is: dealt out in turn, in a random order over all tensors.

        Where the paper draws each by itself, some coordinates may stand for nothing.
        """
        order = np.argsort(np.concatenate([words(f"{seed} {n}", count) for n, count in counts.items()]), kind="stable")
        dealt = np.empty(len(order), np.int32)
        dealt[order] = np.arange(len(order)) % size
        parts = np.split(dealt, np.cumsum(list(counts.values()))[:-1])
        return dict(zip(counts, map(torch.from_numpy, parts), strict=True))

    def spread(self, vector: Tensor) -> Tensor:
        return vector * cast(Tensor, self.scale)

    def part(self, spread: Tensor, map: Tensor, count: int) -> Tensor:
        return spread.index_select(0, map)


class Transformed(SharedVector):
    """Walsh-Hadamard transforms before and after random signs: every number is a sum over all coordinates, E[P' P] = I.

    H S H z over N values, N a power of two, of which a tensor takes as many as it has: without the first transform few
    coordinates would make a pattern that repeats. A transform over N = a b values is two products with small matrices.
    """

    def __init__(self, chunks: list[Tensor], start: Tensors, maps: Tensors) -> None:
        super().__init__(chunks, start, maps)
        self.total = sum(value.numel() for value in start.values())
        self.size = sum(chunk.numel() for chunk in chunks)
        lengths = {_power_of_two(self.size), *(len(signs) for signs in maps.values())}
        for side in sorted({side for length in lengths for side in _sides(length)}):
            self.register_buffer(f"hadamard_{side}", hadamard(side).to(chunks[0]), persistent=False)

    @staticmethod
    def maps(seed: int, counts: Mapping[str, int], size: int) -> Tensors:
        """A sign for each of N values."""
        lengths = {name: _power_of_two(max(count, size)) for name, count in counts.items()}
        return {name: torch.from_numpy(signs(f"{seed} {name}", length)) for name, length in lengths.items()}

    def spread(self, vector: Tensor) -> Tensor:
        return self._transform(F.pad(vector, (0, _power_of_two(self.size) - self.size)))

    def part(self, spread: Tensor, map: Tensor, count: int) -> Tensor:
        numbers = self._transform(spread.repeat(len(map) // len(spread)) * map)
        return numbers[:count] / math.sqrt(len(map) * self.total)

    def _transform(self, values: Tensor) -> Tensor:
        first, second = (getattr(self, f"hadamard_{side}") for side in _sides(len(values)))
        transformed: Tensor = first @ values.view(len(first), len(second)) @ second
        return transformed.view(-1)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _sides(length: int) -> tuple[int, int]:
    """Two powers of two with that product, about equal."""
    first = 1 << (length.bit_length() - 1) // 2
    return first, length // first
