"""Who sees whom in attention, cut to a block and in the form of a term for its scores. No scores are computed here."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

Cut = tuple[slice, slice, slice]
"""Examples, query heads and query rows of a block."""


class Sight(NamedTuple):
    """What the rows of a block see.

    keys: those to compute with. term: what is added to the scores, broadcasts against (examples, heads, rows, keys).
    blind: rows that see nothing. They get no term, so that nothing becomes NaN; their output is to be made zero.
    """

    keys: slice
    term: Tensor | None = None
    blind: Tensor | None = None


class Visibility:
    """A mask (..., L, S), boolean (True is seen) or added to the scores; or every row sees the keys up to its own."""

    def __init__(self, mask: Tensor | None, causal: bool, lead: tuple[int, ...], key: Tensor) -> None:
        """lead: axes before heads of the tensors that the mask goes with; key: (examples, heads, S, D)."""
        self.causal, self.keys = causal, key.shape[-2]
        self.dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
        self.device = key.device
        if mask is not None and mask.dim() > 4:
            mask = mask.expand(*lead, *mask.shape[-3:]).flatten(0, -4)
        self.mask = None if mask is None else mask[(None,) * (4 - mask.dim())]

    @property
    def by_head(self) -> bool:
        return self.mask is not None and self.mask.shape[1] > 1

    def cut(self, at: Cut) -> Sight:
        if self.causal:
            return self._up_to_each_row(at[2])
        if self.mask is None:
            return Sight(slice(self.keys))
        parts = zip(self.mask.shape[:3], at, strict=True)
        mask = self.mask[tuple(slice(None) if size == 1 else part for size, part in parts)]
        hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf
        blind = hidden.all(-1, keepdim=True)
        if mask.dtype == torch.bool:
            term = torch.zeros(mask.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, -math.inf)
        else:
            term = mask.to(self.dtype, copy=True)
        return Sight(slice(self.keys), term.masked_fill_(blind, 0.0), blind)

    def _up_to_each_row(self, rows: slice) -> Sight:
        seen = min(self.keys, rows.stop)
        hidden = torch.ones(rows.stop - rows.start, seen, dtype=torch.bool, device=self.device).triu_(rows.start + 1)
        term = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, -math.inf)
        return Sight(slice(seen), term)
