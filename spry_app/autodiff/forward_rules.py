"""Forward-mode rules that are cheaper or more exact than PyTorch's own, for every architecture at once: functions are
intercepted, modules are never touched. Nothing here chooses directions or measures slopes.

Only what was measured to pay has a rule; where there is none, PyTorch's own forward derivative is used. A rule runs
without an autograd graph.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from spry_app.autodiff import losses, norms, products
from spry_app.autodiff.attention import attention
from spry_app.autodiff.duals import Pair, dual, split, wide
from spry_app.autodiff.fans import along, in_vmap

Rule = Callable[..., Any]
"""The arguments of a function, each with its tangent -> dual number, or NotImplemented for PyTorch's own rule."""

RULES: dict[Callable[..., Any], Rule] = {}
NONE: Pair = (None, None)


class ForwardRules(TorchFunctionMode):
    """Inside it, a function of RULES that is given a tangent follows our rule; every other call is PyTorch's own."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is None or in_vmap():
            return func(*args, **kwargs)
        pairs, named = [split(value) for value in args], {name: split(value) for name, value in kwargs.items()}
        if all(tangent is None for _, tangent in (*pairs, *named.values())):
            return func(*args, **kwargs)
        out = rule(*pairs, **named)
        return func(*args, **kwargs) if out is NotImplemented else out


def _rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def _operator(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """For f(a, b), which is also how operators like a * b arrive; calls with options (alpha, out) are PyTorch's own."""

    def register(rule: Rule) -> Rule:
        def of_two(*operands: Pair, **options: Pair) -> Any:
            return rule(*operands) if len(operands) == 2 and not options else NotImplemented

        return _rule(*functions)(of_two)

    return register


@_rule(F.linear)
def _linear(input: Pair, weight: Pair, bias: Pair = NONE) -> Any:
    return along(products.linear, input, weight, bias) if weight[0].dim() == 2 else NotImplemented


@_rule(torch.addmm)
def _addmm(input: Pair, mat1: Pair, mat2: Pair, **options: Pair) -> Any:
    """GPT-2's linear layers: bias + x w."""
    if options or input[0].dim() != 1:
        return NotImplemented
    return along(lambda bias, x, w: products.linear(x, products.transposed(w), bias), input, mat1, mat2)


@_operator(torch.matmul, Tensor.matmul, torch.bmm, Tensor.bmm)
def _matmul(left: Pair, right: Pair) -> Any:
    return along(products.matmul, left, right)


@_operator(torch.mul, Tensor.mul)
def _multiply(left: Pair, right: Pair) -> Any:
    return along(products.multiply, left, right)


@_operator(torch.add, Tensor.add)
def _add(left: Pair, right: Pair) -> Any:
    return _sum(left, right, 1)


@_operator(torch.sub, Tensor.sub)
def _subtract(left: Pair, right: Pair) -> Any:
    return _sum(left, right, -1)


def _sum(left: Pair, right: Pair, sign: int) -> Any:
    """PyTorch's own rule is as good where both move; where one does, it first makes zeros for the other."""
    if left[1] is not None and right[1] is not None:
        return NotImplemented
    return along(lambda a, b: products.add(a, b, sign), left, right)


@_operator(torch.div, Tensor.div)
def _divide(left: Pair, right: Pair) -> Any:
    return NotImplemented if right[1] is not None else along(products.divide, left, right)


@_operator(torch.pow, Tensor.pow, Tensor.__pow__)
def _power(input: Pair, exponent: Pair) -> Any:
    """The square of RMS norms that are written in Python."""
    if type(exponent[0]) not in (int, float) or exponent[0] != 2:
        return NotImplemented
    return along(products.square, input)


@_rule(F.silu)
def _silu(input: Pair, inplace: Pair = (False, None)) -> Any:
    """Where directions share a pass, PyTorch writes the derivative out, with temporaries of that many activations."""
    return NotImplemented if inplace[0] else along(products.silu, input)


@_rule(torch.softmax, Tensor.softmax)
def _softmax(input: Pair, dim: Pair, dtype: Pair = NONE) -> Any:
    return along(lambda x: norms.softmax(x, dim[0], dtype[0]), input)


@_rule(F.layer_norm)
def _layer_norm(
    input: Pair, normalized_shape: Pair, weight: Pair = NONE, bias: Pair = NONE, eps: Pair = (1e-5, None)
) -> Any:
    return along(lambda x, w, b: norms.layer_norm(x, w, b, normalized_shape[0], eps[0]), input, weight, bias)


@_rule(F.rms_norm)
def _rms_norm(input: Pair, normalized_shape: Pair, weight: Pair = NONE, eps: Pair = NONE) -> Any:
    return along(lambda x, w: norms.rms_norm(x, w, normalized_shape[0], eps[0]), input, weight)


@_rule(F.cross_entropy)
def _cross_entropy(input: Pair, target: Pair, *args: Pair, **kwargs: Pair) -> Any:
    """In fp32 at least: a loss in a half format has no digits left for its slope."""
    given = {name: value for name, (value, _) in kwargs.items() if value is not None}
    ignored, reduction = given.pop("ignore_index", -100), given.pop("reduction", "mean")
    smoothing = given.pop("label_smoothing", 0.0)
    usual = not (args or given or smoothing) and reduction in ("mean", "sum")
    if usual and input[0].dim() == 2 and not target[0].is_floating_point():
        logits = wide(input[0]), None if input[1] is None else wide(input[1])
        return along(lambda x, t: losses.cross_entropy(x, t[0], ignored, reduction), logits, target)
    others: list[Any] = [dual(*pair) for pair in (target, *args)]
    named: dict[str, Any] = {name: dual(*pair) for name, pair in kwargs.items()}
    return F.cross_entropy(wide(dual(*input)), *others, **named)


@_rule(F.scaled_dot_product_attention)
def _attention(
    query: Pair,
    key: Pair,
    value: Pair,
    attn_mask: Pair = NONE,
    dropout_p: Pair = (0.0, None),
    is_causal: Pair = (False, None),
    scale: Pair = NONE,
    enable_gqa: Pair = (False, None),
) -> Any:
    """PyTorch has a forward rule for its MATH kernel alone, which keeps all scores; ours works in blocks."""
    if is_causal[0] and attn_mask[0] is not None:
        raise RuntimeError("scaled_dot_product_attention got both attn_mask and is_causal=True; give one of them")
    if attn_mask[1] is not None:  # a position bias that is trained: rare
        with sdpa_kernel(SDPBackend.MATH):
            q, k, v, mask = (dual(*pair) for pair in (query, key, value, attn_mask))
            options = {"dropout_p": dropout_p[0], "scale": scale[0], "enable_gqa": enable_gqa[0]}
            return F.scaled_dot_product_attention(q, k, v, mask, **options)
    how = dropout_p[0], is_causal[0], scale[0]
    return along(lambda q, k, v, mask: attention(q, k, v, mask[0], *how), query, key, value, attn_mask)
