"""Attention and its tangent in blocks of query rows, on pairs of tensors. Nothing here intercepts anything."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from spry_app.autodiff.duals import Pair, wide

SCORE_BYTES = 2 << 20
"""Scores kept at once: this many bytes, or as many as the query takes where that is more. So memory grows linearly
with the sequence, and long batches are not cut into slivers."""


def attention(
    query: Pair, key: Pair, value: Pair, mask: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> Pair:
    """Output and tangent (..., H, L, E) of query (..., H, L, D), key (..., G, S, D) and value (..., G, S, E).

    H is a multiple of G: query heads share key heads, which are never repeated. `mask` (..., L, S) is boolean (True is
    seen) or is added to the scores. Equal to PyTorch's MATH kernel but for rounding; half formats compute in fp32.
    """
    q = query[0]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[-3] // key[0].shape[-3] if q.dim() > 2 else 1
    key, value = _each(wide, key), _each(wide, value)
    rows, keys = q.shape[-2], key[0].shape[-2]
    # The tangent is made from a tangent: with several directions at once (vmap) it is larger than the output.
    like = next(t for t in (query[1], key[1], value[1]) if t is not None)
    out, tangent = (x.new_empty((*q.shape[:-1], value[0].shape[-1])).to(q.dtype) for x in (q, like))
    step = _rows_at_once(q, keys, key[0].element_size())
    if step < rows:  # else every block would copy them again
        key, value = _each(Tensor.contiguous, key), _each(Tensor.contiguous, value)
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        seen = slice(min(keys, block.stop) if causal else keys)
        visible = _causal(block, seen, q.device) if causal else _mask_rows(mask, block)
        scaled = _each(lambda x: _fold(wide(x) * scale, group), _rows(query, block))
        scores = _each(lambda x: _unfold(x, group), _scores(scaled, _rows(key, seen)))
        weights = _each(lambda x: _fold(x, group), _softmax(scores, visible, dropout))
        mixed, mixed_t = _each(lambda x: _unfold(x, group), _mix(weights, _rows(value, seen)))
        assert mixed_t is not None
        out[..., block, :] = mixed
        tangent[..., block, :] = mixed_t
    return out, tangent


def _scores(query: Pair, key: Pair) -> Pair:
    """q k' and its tangent qt k' + q kt' = [qt q] [k kt]': one product, no second tensor of the scores' size."""
    (q, qt), (k, kt) = query, key
    if qt is not None and kt is not None:
        return q @ k.mT, torch.cat((qt, q), -1) @ torch.cat((k, kt), -1).mT
    if qt is not None:
        return q @ k.mT, qt @ k.mT
    return q @ k.mT, None if kt is None else q @ kt.mT


def _softmax(scores: Pair, mask: Tensor | None, dropout: float) -> Pair:
    """p = softmax(s), dp = p (ds - sum(p ds)), in place; a row that sees nothing is zero, as in PyTorch."""
    score, tangent = scores
    blind = None
    if mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf
        blind = hidden.all(-1, keepdim=True)
        score = score.masked_fill_(hidden, -math.inf) if mask.dtype == torch.bool else score.add_(mask)
    weight = score.softmax(-1)
    if blind is not None:
        weight.masked_fill_(blind, 0.0)
    if tangent is not None:
        tangent.mul_(weight)
        tangent = torch.addcmul(tangent, weight, tangent.sum(-1, keepdim=True), value=-1)  # vmap lacks addcmul_
    if dropout > 0:
        keep = torch.empty_like(weight).bernoulli_(1 - dropout).div_(1 - dropout)
        return _each(keep.mul, (weight, tangent))
    return weight, tangent


def _mix(weights: Pair, value: Pair) -> Pair:
    """o = p v, do = dp v + p dv."""
    (p, pt), (v, vt) = weights, value
    tangent = None if pt is None else pt @ v
    if vt is not None:
        tangent = p @ vt if tangent is None else tangent.add_(p @ vt)
    return p @ v, tangent


def _rows_at_once(query: Tensor, keys: int, element_size: int) -> int:
    rows, width = query.shape[-2:]
    a_row = query.numel() // max(1, rows * width) * keys * element_size
    return max(1, max(SCORE_BYTES, query.numel() * element_size) // max(1, a_row))


def _mask_rows(mask: Tensor | None, block: slice) -> Tensor | None:
    return mask if mask is None or mask.dim() < 2 or mask.shape[-2] == 1 else mask[..., block, :]


def _causal(block: slice, seen: slice, device: torch.device) -> Tensor:
    return torch.ones(block.stop - block.start, seen.stop, dtype=torch.bool, device=device).tril_(block.start)


def _each(function: Callable[[Tensor], Tensor], pair: Pair) -> Pair:
    return function(pair[0]), None if pair[1] is None else function(pair[1])


def _rows(pair: Pair, rows: slice) -> Pair:
    return _each(lambda x: x[..., rows, :], pair)


def _fold(tensor: Tensor, group: int) -> Tensor:
    """Rows of the heads that share a key head become rows of one head: (..., H, L, S) -> (..., G, H/G L, S)."""
    return tensor if group == 1 else torch.unflatten(tensor, -3, (-1, group)).flatten(-3, -2)


def _unfold(tensor: Tensor, group: int) -> Tensor:
    return tensor if group == 1 else torch.unflatten(tensor, -2, (group, -1)).flatten(-4, -3)
