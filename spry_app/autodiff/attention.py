"""Attention and its tangents, block by block, along one direction or several. Nothing here intercepts anything."""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spry_app.autodiff.duals import wide
from spry_app.autodiff.fans import Fan, directions
from spry_app.autodiff.visibility import Cut, Sight, Visibility
from spry_app.autodiff.workspace import DEFAULT_BYTES, workspace_bytes

CAUSAL_ROWS = 64
"""Blocks of fewer rows gain nothing from leaving out the keys that their rows do not see."""

Part = tuple[Tensor, Iterable[Tensor | None]]
"""A block of a fan as (heads of all its examples, rows, width), and the same of each direction."""


class _Sizes(NamedTuple):
    """Examples, key heads (each with the query heads that share it) and query rows of a block."""

    examples: int
    heads: int
    rows: int


def attention(
    query: Fan, key: Fan, value: Fan, mask: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output (..., H, L, E) and its tangents, of query (..., H, L, D), key (..., G, S, D) and value (..., G, S, E).

    H is a multiple of G: query heads share key heads, which are never repeated. `mask` (..., L, S) is boolean (True is
    seen) or is added to the scores. Equal to PyTorch's MATH kernel but for rounding; half formats compute in fp32.
    The scores and one tangent of them exist for one block at a time: within workspace_bytes(), or for one row of one
    key head where that is more. While that limit is the default one, a GPU gets blocks as large as the query: it would
    starve on small ones, while a CPU is fastest with what fits into its cache.
    """
    shape = (*query[0].shape[:-1], value[0].shape[-1])
    scale = 1 / math.sqrt(query[0].shape[-1]) if scale is None else scale
    query, key, value = (_with_four_axes(fan, shape[:-3]) for fan in (query, key, value))
    examples, heads, rows, _ = query[0].shape
    # Heads lie beside one another, as the layer that follows reads them: it need not copy.
    lying = (examples, rows, heads, shape[-1])
    out = query[0].new_empty(lying).transpose(1, 2)
    tangent = query[0].new_empty((directions(query[1], key[1], value[1]), *lying)).transpose(2, 3)
    visibility, group = Visibility(mask, causal, shape[:-3], key[0]), heads // key[0].shape[1]
    for at, sight in _blocks(query[0], key[0], visibility):
        of_keys = (at[0], slice(at[1].start // group, at[1].stop // group), sight.keys)
        parts = _part(query, at, group), _part(key, of_keys, 1), _part(value, of_keys, 1)
        results = _mixed(*parts, out[at].shape[:-1], sight.term, dropout, scale)
        for whole, mixed in zip((out, *tangent), results, strict=True):
            block = whole[at]
            block.copy_(mixed.view(block.shape))
            if sight.blind is not None:
                block.masked_fill_(sight.blind, 0.0)
    return out.reshape(shape), tangent.reshape(-1, *shape)


def _mixed(
    query: Part, key: Part, value: Part, shape: torch.Size, term: Tensor | None, dropout: float, scale: float
) -> Iterator[Tensor]:
    """p v with p = softmax(scale q k' + term); then dp v + p dv for each direction.

    shape: (examples, query heads, rows), to which `term` belongs.

    dp = p (ds - sum p ds), so dp v = (p ds) v - (sum p ds) (p v): the sum is taken off where tensors are small.
    """
    (q, qts), (k, kts), (v, vts) = query, key, value
    scores = _product(q, k.mT, scale)
    if term is not None:
        scores.view(*shape, -1).add_(term)
    weights = scores.softmax(-1)
    del scores
    keep = torch.empty_like(weights).bernoulli_(1 - dropout).div_(1 - dropout) if dropout > 0 else None
    kept = weights if keep is None else weights * keep
    mixed = torch.bmm(kept, v)
    yield mixed
    for qt, kt, vt in zip(qts, kts, vts, strict=False):
        moved = None if qt is None else _product(qt, k.mT, scale)
        if kt is not None:
            moved = _product(q, kt.mT, scale) if moved is None else moved.baddbmm_(q, kt.mT, alpha=scale)
        out = None if vt is None else torch.bmm(kept, vt)
        if moved is not None:
            total = moved.mul_(weights).sum(-1, keepdim=True)
            moved = moved if keep is None else moved.mul_(keep)
            out = torch.bmm(moved, v) if out is None else out.baddbmm_(moved, v)
            out.addcmul_(mixed, total, value=-1)
        assert out is not None
        yield out


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale a b, without a copy of either."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _blocks(query: Tensor, key: Tensor, visibility: Visibility) -> Iterator[tuple[Cut, Sight]]:
    examples, heads, rows, _ = query.shape
    group = heads // key.shape[1]
    step = _at_once(query, key, visibility.causal)
    by_example, by_row = _slices(examples, step.examples), _slices(rows, step.rows)
    by_head = _slices(heads, step.heads * group)
    if query.is_meta:  # nothing is computed, and no block takes more than these: the last rows see the most keys
        by_example, by_row, by_head = by_example[:2], by_row[-3:], by_head[:2]
    for of_examples, of_rows in itertools.product(by_example, by_row):
        sight = None
        for of_heads in by_head:
            at = (of_examples, of_heads, of_rows)
            if sight is None or visibility.by_head:
                sight = visibility.cut(at)
            yield at, sight


def _at_once(query: Tensor, key: Tensor, causal: bool) -> _Sizes:
    """As many examples as the limit allows, or key heads of one, or rows of one head."""
    heads, rows = query.shape[1:3]
    key_heads, keys = key.shape[1:3]
    limit = workspace_bytes() // (2 * wide(query[:0]).element_size())  # scores, and a tangent of them
    if query.is_cuda and workspace_bytes() == DEFAULT_BYTES:
        limit = max(limit, query.numel())
    if causal:
        rows = min(rows, max(CAUSAL_ROWS, math.ceil(rows / 4)))
    a_row = heads // key_heads * keys
    if limit < rows * a_row:
        return _Sizes(1, 1, max(1, limit // a_row))
    if limit < key_heads * rows * a_row:
        return _Sizes(1, limit // (rows * a_row), rows)
    return _Sizes(limit // (key_heads * rows * a_row), key_heads, rows)


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _with_four_axes(fan: Fan, lead: tuple[int, ...]) -> Fan:
    """(..., heads, rows, width) -> (examples, heads, rows, width), likewise every tangent."""

    def four(x: Tensor, first: tuple[int, ...]) -> Tensor:
        heads = x.shape[-3] if x.dim() > len(first) + 2 else 1
        x = x.expand(*first, *lead, *x.shape[-3:]) if lead else x
        return x.reshape(*first, math.prod(lead), heads, *x.shape[-2:])

    x, xt = fan
    return four(x, ()), None if xt is None else four(xt, (len(xt),))


def _part(fan: Fan, at: Cut, group: int) -> Part:
    """Rows of the heads that share a key head become rows of that head."""

    def fold(x: Tensor) -> Tensor:
        block = wide(x[at])
        return block.reshape(-1, group * block.shape[2], block.shape[3])

    x, xt = fan
    return fold(x), itertools.repeat(None) if xt is None else map(fold, xt)
