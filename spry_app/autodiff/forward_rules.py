"""Forward-mode rules that are cheaper or more exact than PyTorch's own, for every architecture at once: functions are
intercepted, modules are never touched. Nothing here chooses directions or measures slopes.

A rule gets dual numbers (a primal value and its tangent) and returns one. It runs without an autograd graph.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from spry_app.autodiff.attention import attention
from spry_app.autodiff.duals import dual, split, wide

Rule = Callable[..., Tensor]
RULES: dict[Callable[..., Any], Rule] = {}


class ForwardRules(TorchFunctionMode):
    """Inside it, a function of RULES that is given a tangent follows our rule; every other call is PyTorch's own."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is None or not any(split(value)[1] is not None for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        return rule(*args, **kwargs)


def _rule(function: Callable[..., Any]) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES[function] = rule
        return rule

    return register


def _sum(into: Tensor | None, term: Tensor) -> Tensor:
    """Accumulate in place; `into` must be a fresh tensor of this file, never an input."""
    return term if into is None else into.add_(term)


@_rule(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Two products where the weight is frozen (PyTorch's own rule takes three), three where it is trained."""
    (x, xt), (w, wt), (b, bt) = split(input), split(weight), split(bias)
    out = F.linear(x, w, b)
    tangent = None if xt is None else F.linear(xt, w)
    if wt is not None:
        tangent = _sum(tangent, F.linear(x, wt))
    if bt is not None:
        tangent = bt.expand_as(out) if tangent is None else tangent.add_(bt)
    return dual(out, tangent)


@_rule(F.layer_norm)
def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = n w + b with n = (x - mean x) / std x; dn = (dx - mean dx - n mean(n dx)) / std x."""
    x, xt = split(input)
    normal, _, inverse_std = torch.native_layer_norm(wide(x), normalized_shape, None, None, eps)
    tangent = None
    if xt is not None:
        dims = tuple(range(-len(normalized_shape), 0))
        tangent = wide(xt) - wide(xt).mean(dims, keepdim=True)
        projection = (normal * tangent).mean(dims, keepdim=True)
        tangent = torch.addcmul(tangent, normal, projection, value=-1).mul_(inverse_std)  # vmap lacks addcmul_
    return _scale_and_shift(normal, tangent, weight, bias, x.dtype)


@_rule(F.rms_norm)
def _rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """y = n w with n = x / rms x; dn = (dx - n mean(n dx)) / rms x."""
    x, xt = split(input)
    wide_x = wide(x)
    dims = tuple(range(-len(normalized_shape), 0))
    square = wide_x.square().mean(dims, keepdim=True)
    inverse_rms = square.add_(torch.finfo(wide_x.dtype).eps if eps is None else eps).rsqrt_()
    normal = wide_x * inverse_rms
    tangent = None
    if xt is not None:
        projection = (normal * wide(xt)).mean(dims, keepdim=True)
        tangent = torch.addcmul(wide(xt), normal, projection, value=-1).mul_(inverse_rms)
    return _scale_and_shift(normal, tangent, weight, None, x.dtype)


def _scale_and_shift(
    normal: Tensor, tangent: Tensor | None, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    (w, wt), (b, bt) = split(weight), split(bias)
    if tangent is not None and w is not None:
        tangent.mul_(w)
    if wt is not None:
        tangent = _sum(tangent, normal * wt)
    if w is not None:
        normal.mul_(w)
    if bt is not None:
        tangent = bt.expand_as(normal) if tangent is None else tangent.add_(bt)
    if b is not None:
        normal.add_(b)
    assert tangent is not None
    return dual(normal.to(dtype), tangent.to(dtype))


@_rule(F.cross_entropy)
def _cross_entropy(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's own rule, in fp32: a loss in a half format has no digits left for its slope."""
    return F.cross_entropy(wide(input), *args, **kwargs)


@_rule(F.scaled_dot_product_attention)
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch has a forward rule for its MATH kernel alone, which keeps all scores; ours works in blocks of rows."""
    if is_causal and attn_mask is not None:
        raise RuntimeError("scaled_dot_product_attention got both attn_mask and is_causal=True; give one of them")
    mask, mask_tangent = split(attn_mask)
    if mask_tangent is not None:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    return dual(*attention(split(query), split(key), split(value), mask, dropout_p, is_causal, scale))
