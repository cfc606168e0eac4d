"""The rules equal PyTorch's own forward derivatives, at a lower price, and leave all else alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from derivatives import EXACT, alone, assert_like_pytorch, noise, subsets
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MODELS, tiny_batch, tiny_model, trainables
from torch import Tensor
from torch.func import functional_call

from spry_app.autodiff.duals import dual
from spry_app.autodiff.forward_rules import RULES, ForwardRules

SHAPES: dict[str, list[tuple[tuple[int, ...], ...]]] = {
    "elementwise": [((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (4,)), ((3, 1), (2, 3, 4)), ((), (2, 3)), ((2, 3), ())],
    "products": [
        ((3, 4), (4, 5)),
        ((2, 3, 4), (4, 5)),
        ((2, 3, 4), (2, 4, 5)),
        ((2, 1, 3, 4), (3, 4, 5)),
        ((4,), (4, 5)),
        ((3, 4), (4,)),
    ],
    "batches": [((2, 3, 4), (2, 4, 5))],
    "bias, rows, weight": [((5,), (3, 4), (4, 5)), ((3, 5), (3, 4), (4, 5))],
    "rows, weight, bias": [((4,), (5, 4), (5,)), ((3, 4), (5, 4), (5,)), ((2, 3, 4), (5, 4), (5,))],
    "rows, weight": [((2, 3, 4), (5, 4)), ((3, 4), (4,))],
    "square": [((2, 3),)],
}
CASES: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("rows, weight, bias", "rows, weight"),
    torch.addmm: ("bias, rows, weight",),
    torch.matmul: ("products",),
    Tensor.matmul: ("products",),
    torch.bmm: ("batches",),
    Tensor.bmm: ("batches",),
    F.silu: ("square",),
} | dict.fromkeys(
    (torch.mul, Tensor.mul, torch.add, Tensor.add, torch.sub, Tensor.sub, torch.div, Tensor.div), ("elementwise",)
)
DRAWN = [
    pytest.param(function, shapes, id=f"{function.__name__}-{'-'.join(map(str, shapes))}")
    for function, kinds in CASES.items()
    for kind in kinds
    for shapes in SHAPES[kind]
]
OTHERS = {torch.pow, Tensor.pow, Tensor.__pow__, torch.softmax, Tensor.softmax, F.layer_norm, F.rms_norm} | {
    F.cross_entropy,
    F.scaled_dot_product_attention,
}
"""Tested below and in test_attention."""


def test_every_rule_is_tested() -> None:
    assert set(RULES) == set(CASES) | OTHERS


@pytest.mark.parametrize(("function", "shapes"), DRAWN)
def test_products_and_sums_equal_pytorch_whatever_moves(
    function: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...]
) -> None:
    tensors = {name: noise(*shape, seed=at) + 2 for at, (name, shape) in enumerate(zip("abc", shapes, strict=False))}
    for moving in subsets(" ".join(tensors)):
        assert_like_pytorch(lambda **named: function(*named.values()), tensors, moving)


@pytest.mark.parametrize(
    "of",
    [lambda x: 2 * x, lambda x: x - 1, lambda x: 1 + x, lambda x: x / 3],
    ids=["2 * x", "x - 1", "1 + x", "x / 3"],
)
def test_numbers_are_no_operands_with_tangents(of: Callable[[Tensor], Tensor]) -> None:
    assert_like_pytorch(of, {"x": noise(2, 3)}, ["x"])


@pytest.mark.parametrize("exponent", [2, 2.0, 3, 0.5, torch.tensor(2.0)], ids=str)
def test_powers_equal_pytorch(exponent: Any) -> None:
    for power in (torch.pow, Tensor.pow, Tensor.__pow__):
        assert_like_pytorch(lambda x, power=power: power(x, exponent), {"x": noise(2, 3).abs()}, ["x"])
    assert_like_pytorch(lambda x: torch.pow(2, x), {"x": noise(2, 3)}, ["x"])


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)], ids=str)
@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((), (2, 3)), ((2, 3), ())], ids=str)
def test_operands_of_two_formats_have_the_format_of_pytorchs_result(dtypes: Any, shapes: Any) -> None:
    tensors = {
        n: noise(*s, seed=at, dtype=d) + 2 for at, (n, s, d) in enumerate(zip("ab", shapes, dtypes, strict=True))
    }
    for function in (torch.mul, torch.add, torch.sub, torch.div):
        for moving in subsets("a b"):
            value, tangent = alone(lambda a, b, function=function: function(a, b), tensors, moving, rules=True)
            assert value.dtype == function(*tensors.values()).dtype == tangent.dtype  # type: ignore[union-attr]
            tolerance = {"rtol": 0.05, "atol": 0.05} if value.dtype == torch.bfloat16 else {"rtol": 0.02, "atol": 0.02}
            assert_like_pytorch(lambda a, b, function=function: function(a, b), tensors, moving, **tolerance)


@pytest.mark.parametrize(
    ("call", "options"), [(torch.add, {"alpha": 3}), (torch.sub, {"alpha": 3}), (torch.div, {"rounding_mode": None})]
)
def test_calls_with_options_are_pytorchs_own(call: Callable[..., Tensor], options: dict[str, Any]) -> None:
    assert_like_pytorch(lambda a, b: call(a, b, **options), {"a": noise(2, 3), "b": noise(2, 3, seed=1)}, ["a"])


def test_what_a_sum_returns_may_be_changed_in_place() -> None:
    """PyTorch changes its tangent in place too, which must not be that of the operand."""

    def function(x: Tensor) -> Tensor:
        y = x + 1
        y *= 3
        return x + y

    assert_like_pytorch(function, {"x": noise(2, 3)}, ["x"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_silu_has_the_slope_of_its_formula_rounded_once(dtype: torch.dtype) -> None:
    """Of x / (1 + exp(-x)), by backpropagation in float64."""
    x = torch.linspace(-30, 30, 121, dtype=torch.float64).to(dtype)
    leaf = x.double().requires_grad_(True)
    (slope,) = torch.autograd.grad((leaf / (1 + torch.exp(-leaf))).sum(), leaf)
    with torch.no_grad(), fwAD.dual_level(), ForwardRules():
        for function in (F.silu, lambda x: F.silu(x * 1, inplace=True)):
            tangent = fwAD.unpack_dual(function(dual(x, torch.ones_like(x)))).tangent
            torch.testing.assert_close(tangent.double(), slope, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_softmax_equals_pytorch(dim: int, dtype: torch.dtype | None) -> None:
    tolerance = EXACT if dtype is None else {"rtol": 1e-5, "atol": 1e-7}
    for softmax in (torch.softmax, Tensor.softmax, F.softmax):
        assert_like_pytorch(
            lambda x, f=softmax: f(x, dim=dim, dtype=dtype), {"x": 3 * noise(2, 3, 4)}, ["x"], **tolerance
        )


@pytest.mark.parametrize("moving", subsets("input weight bias"), ids="+".join)
@pytest.mark.parametrize("dims", [1, 2])
def test_layer_norm_equals_pytorch(moving: tuple[str, ...], dims: int) -> None:
    shape = (3, 4)[-dims:]
    tensors = {"input": 3 + noise(2, 3, 4), "weight": noise(*shape, seed=1), "bias": noise(*shape, seed=2)}

    def norm(input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.layer_norm(input, shape, weight, bias, eps=0.01)

    assert_like_pytorch(norm, tensors, moving)
    if moving == ("input",):
        assert_like_pytorch(norm, {"input": tensors["input"]}, moving)


@pytest.mark.parametrize("moving", subsets("input weight"), ids="+".join)
@pytest.mark.parametrize("eps", [None, 0.01])
def test_rms_norm_equals_pytorch(moving: tuple[str, ...], eps: float | None) -> None:
    tensors = {"input": 3 + noise(2, 3, 4), "weight": noise(4, seed=1)}
    assert_like_pytorch(lambda input, weight: F.rms_norm(input, (4,), weight, eps), tensors, moving)
    if moving == ("input",):
        assert_like_pytorch(lambda input: F.rms_norm(input, (4,), eps=eps), {"input": tensors["input"]}, moving)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 3), st.sampled_from([0.0, 40.0]))
def test_norms_and_softmax_of_any_shape_equal_pytorch(shape: list[int], seed: int, shift: float) -> None:
    """Also where the mean is far from zero."""
    tensors = {"x": noise(*shape, seed=seed) + shift, "weight": noise(shape[-1], seed=seed + 1)}
    last = (shape[-1],)
    for function in (
        lambda x, weight: F.layer_norm(x, last, weight, weight, 1e-5),
        lambda x, weight: F.rms_norm(x, last, weight, 1e-5),
        lambda x, weight: torch.softmax(x, -1) * weight,
    ):
        assert_like_pytorch(function, tensors, ["x", "weight"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"ignore_index": 1}], ids=lambda o: str(o)
)
def test_cross_entropy_equals_pytorch(options: dict[str, Any]) -> None:
    labels = torch.tensor([0, 2, 1, 1])
    assert_like_pytorch(lambda input: F.cross_entropy(input, labels, **options), {"input": noise(4, 3)}, ["input"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_norms_of_half_formats_keep_their_format_and_compute_in_fp32(norm: str, dtype: torch.dtype) -> None:
    """The derivative of the same rounded inputs in fp32, rounded once: half a unit in the last place."""
    tensors = {"input": noise(4, 64, dtype=dtype), "weight": noise(64, seed=1, dtype=dtype)}

    def function(input: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(input, (64,), weight) if norm == "layer_norm" else F.rms_norm(input, (64,), weight, 1e-5)

    value, tangent = alone(function, tensors, ["input", "weight"], rules=True)
    exact = {name: tensor.float() for name, tensor in tensors.items()}
    with torch.no_grad(), fwAD.dual_level():
        moved = {n: dual(t, noise(*t.shape, seed=50 + i).to(dtype).float()) for i, (n, t) in enumerate(exact.items())}
        wanted, wanted_tangent = fwAD.unpack_dual(function(**moved))
    assert value.dtype == dtype and tangent is not None and tangent.dtype == dtype
    one_rounding = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(value.float(), wanted, **one_rounding)
    torch.testing.assert_close(tangent.float(), wanted_tangent, **one_rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_of_half_logits_is_fp32(dtype: torch.dtype) -> None:
    logits, labels = noise(4, 3, dtype=dtype), torch.tensor([0, 2, 1, 1])
    value, tangent = alone(lambda input: F.cross_entropy(input, labels), {"input": logits}, ["input"], rules=True)
    assert value.dtype == torch.float32 and tangent is not None and tangent.dtype == torch.float32
    torch.testing.assert_close(value, F.cross_entropy(logits.float(), labels))


def test_without_a_tangent_every_function_is_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("a rule ran without a tangent")

    for function in list(RULES):
        monkeypatch.setitem(RULES, function, never)
    x = noise(2, 3, 4, dtype=torch.float32)
    with fwAD.dual_level(), ForwardRules():
        F.linear(torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 3, dtype=torch.int64))
        F.layer_norm(x, (4,))
        F.rms_norm(x, (4,))
        F.cross_entropy(x[0], torch.tensor([0, 1, 2]))
        F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(3, 3, dtype=torch.bool))
        torch.softmax(x * 2 + x / 3 - x**2, -1)
    with fwAD.dual_level(), ForwardRules(), pytest.raises(AssertionError):
        F.layer_norm(dual(x, x), (4,))


@pytest.mark.parametrize("family", MODELS)
def test_the_rules_reach_attention_in_stock_transformers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model(family), tiny_batch()
    batch.pop("labels")
    rule, used = RULES[F.scaled_dot_product_attention], []

    def watch(*args: object, **kwargs: object) -> Tensor:
        used.append(True)
        return rule(*args, **kwargs)

    monkeypatch.setitem(RULES, F.scaled_dot_product_attention, watch)
    with torch.no_grad(), fwAD.dual_level(), ForwardRules():
        duals = {name: dual(tensor, torch.ones_like(tensor)) for name, tensor in trainables(model).items()}
        functional_call(model, duals, kwargs=batch)
    assert len(used) == 2  # one a layer
