"""The rules equal PyTorch's own forward derivatives, at a lower price, and leave all else alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MODELS, tiny_batch, tiny_model, trainables
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from spry_app.autodiff.duals import dual, split
from spry_app.autodiff.forward_rules import RULES, ForwardRules
from spry_app.autodiff.workspace import workspace

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def _noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _evaluate(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], moving: set[str], rules: bool
) -> tuple[Tensor, Tensor | None]:
    """Value and tangent of function(**tensors), where those in `moving` have one; without rules, by the MATH kernel."""
    with torch.no_grad(), fwAD.dual_level(), ForwardRules() if rules else sdpa_kernel(SDPBackend.MATH):
        args = {
            name: dual(value, _noise(*value.shape, seed=50 + at).to(value.dtype) if name in moving else None)
            for at, (name, value) in enumerate(tensors.items())
        }
        return split(function(**args))


def _assert_like_pytorch(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], moving: set[str], **tolerance: float
) -> None:
    ours, theirs = (_evaluate(function, tensors, moving, rules) for rules in (True, False))
    torch.testing.assert_close(ours, theirs, **(tolerance or EXACT))


def _subsets(names: str) -> list[set[str]]:
    letters = names.split()
    return [{name for at, name in enumerate(letters) if bits >> at & 1} for bits in range(1, 2 ** len(letters))]


@contextmanager
def _products() -> Iterator[list[str]]:
    """The matrix products that are computed inside, by name."""
    seen: list[str] = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__.rstrip("_")
            if name in {"mm", "addmm", "bmm", "baddbmm", "addbmm", "linear"}:
                seen.append(name)
            return func(*args, **(kwargs or {}))

    with Counter():
        yield seen


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("moving", _subsets("input weight bias"), ids=lambda names: "+".join(sorted(names)))
def test_linear_equals_pytorch(shape: tuple[int, ...], moving: set[str]) -> None:
    tensors = {"input": _noise(*shape), "weight": _noise(5, 4, seed=1), "bias": _noise(5, seed=2)}
    _assert_like_pytorch(F.linear, tensors, moving)
    if "bias" not in moving:
        _assert_like_pytorch(F.linear, {name: tensors[name] for name in ("input", "weight")}, moving)


@pytest.mark.parametrize("moving", _subsets("input weight bias"), ids=lambda names: "+".join(sorted(names)))
@pytest.mark.parametrize("dims", [1, 2])
def test_layer_norm_equals_pytorch(moving: set[str], dims: int) -> None:
    shape = (3, 4)[-dims:]
    tensors = {"input": 3 + _noise(2, 3, 4), "weight": _noise(*shape, seed=1), "bias": _noise(*shape, seed=2)}

    def norm(input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.layer_norm(input, shape, weight, bias, eps=0.01)

    _assert_like_pytorch(norm, tensors, moving)
    if moving == {"input"}:
        _assert_like_pytorch(norm, {"input": tensors["input"]}, moving)


@pytest.mark.parametrize("moving", _subsets("input weight"), ids=lambda names: "+".join(sorted(names)))
@pytest.mark.parametrize("eps", [None, 0.01])
def test_rms_norm_equals_pytorch(moving: set[str], eps: float | None) -> None:
    tensors = {"input": 3 + _noise(2, 3, 4), "weight": _noise(4, seed=1)}
    _assert_like_pytorch(lambda input, weight: F.rms_norm(input, (4,), weight, eps), tensors, moving)
    if moving == {"input"}:
        _assert_like_pytorch(lambda input: F.rms_norm(input, (4,), eps=eps), {"input": tensors["input"]}, moving)


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"ignore_index": 1}], ids=lambda o: str(o)
)
def test_cross_entropy_equals_pytorch(options: dict[str, Any]) -> None:
    labels = torch.tensor([0, 2, 1, 1])
    _assert_like_pytorch(lambda input: F.cross_entropy(input, labels, **options), {"input": _noise(4, 3)}, {"input"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_norms_of_half_formats_keep_their_format_and_compute_in_fp32(norm: str, dtype: torch.dtype) -> None:
    tensors = {"input": _noise(4, 64, dtype=dtype), "weight": _noise(64, seed=1, dtype=dtype)}

    def function(input: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(input, (64,), weight) if norm == "layer_norm" else F.rms_norm(input, (64,), weight, 1e-5)

    value, tangent = _evaluate(function, tensors, {"input", "weight"}, rules=True)
    # The derivative of the same rounded inputs in fp32, rounded once: half a unit in the last place.
    exact = {name: tensor.float() for name, tensor in tensors.items()}
    with torch.no_grad(), fwAD.dual_level():
        moved = {n: dual(t, _noise(*t.shape, seed=50 + i).to(dtype).float()) for i, (n, t) in enumerate(exact.items())}
        wanted, wanted_tangent = split(function(**moved))
    assert value.dtype == dtype and tangent is not None and tangent.dtype == dtype and wanted_tangent is not None
    one_rounding = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(value.float(), wanted, **one_rounding)
    torch.testing.assert_close(tangent.float(), wanted_tangent, **one_rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_of_half_logits_is_fp32(dtype: torch.dtype) -> None:
    logits, labels = _noise(4, 3, dtype=dtype), torch.tensor([0, 2, 1, 1])
    value, tangent = _evaluate(lambda input: F.cross_entropy(input, labels), {"input": logits}, {"input"}, rules=True)
    assert value.dtype == torch.float32 and tangent is not None and tangent.dtype == torch.float32
    torch.testing.assert_close(value, F.cross_entropy(logits.float(), labels))


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_attention_equals_the_math_kernel(data: st.DataObject) -> None:
    """Any shape, mask, sharing of key heads, set of moving tensors, and size of the blocks."""
    batch, heads, group = (data.draw(st.integers(1, 3), name) for name in ("batch", "key heads", "sharing"))
    rows, keys, width = (data.draw(st.integers(1, 7), name) for name in ("rows", "keys", "width"))
    kind = data.draw(st.sampled_from(["none", "bool", "padding", "additive", "causal"]))
    moving = data.draw(st.sampled_from(_subsets("query key value")))
    scale = data.draw(st.sampled_from([None, 0.3]))
    block_bytes = data.draw(st.sampled_from([1, 200, 2**20]))
    mask = {
        "bool": _noise(1, 1, rows, keys, seed=4) > 0.3,
        "padding": (torch.arange(keys) < 1 + torch.arange(batch)[:, None])[:, None, None, :],
        "additive": _noise(batch, heads * group, rows, keys, seed=5).masked_fill(_noise(rows, keys) > 1, -torch.inf),
    }.get(kind)
    tensors = {
        "query": _noise(batch, heads * group, rows, width),
        "key": _noise(batch, heads, keys, width, seed=1),
        "value": _noise(batch, heads, keys, width + 1, seed=2),
    }
    options = {"attn_mask": mask, "is_causal": kind == "causal", "scale": scale, "enable_gqa": group > 1}
    with workspace(block_bytes):
        _assert_like_pytorch(lambda **qkv: F.scaled_dot_product_attention(**qkv, **options), tensors, moving)


def test_a_row_that_sees_no_key_is_zero_and_spoils_nothing() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    tensors = {name: _noise(1, 1, 2, 3, seed=at) for at, name in enumerate(("query", "key", "value"))}
    value, tangent = _evaluate(
        lambda **qkv: F.scaled_dot_product_attention(**qkv, attn_mask=mask), tensors, set(tensors), rules=True
    )
    assert tangent is not None
    assert value[0, 0, 1].eq(0).all() and tangent[0, 0, 1].eq(0).all()
    assert value[0, 0, 0].ne(0).all() and tangent.isfinite().all()


def test_attention_dropout_drops_value_and_tangent_alike() -> None:
    """With one-hot values the output is the weights themselves: what is kept is scaled by 1 / (1 - p), in both."""
    query, key = _noise(1, 1, 40, 3), _noise(1, 1, 50, 3, seed=1)
    tensors = {"query": query, "key": key, "value": torch.eye(50, dtype=torch.float64)[None, None]}
    moving = {"query", "key"}
    plain, plain_t = _evaluate(F.scaled_dot_product_attention, tensors, moving, rules=True)
    dropped, dropped_t = _evaluate(
        lambda **qkv: F.scaled_dot_product_attention(**qkv, dropout_p=0.25), tensors, moving, rules=True
    )
    assert plain_t is not None and dropped_t is not None
    kept = dropped != 0
    assert abs(kept.double().mean().item() - 0.75) < 5 * (0.25 * 0.75 / kept.numel()) ** 0.5
    torch.testing.assert_close(dropped, torch.where(kept, plain / 0.75, 0.0), **EXACT)
    torch.testing.assert_close(dropped_t, torch.where(kept, plain_t / 0.75, 0.0), **EXACT)


def test_attention_of_a_half_format_computes_in_fp32() -> None:
    tensors = {
        name: _noise(1, 2, 9, 8, seed=i, dtype=torch.bfloat16) for i, name in enumerate(("query", "key", "value"))
    }
    ours = _evaluate(F.scaled_dot_product_attention, tensors, set(tensors), rules=True)
    theirs = _evaluate(F.scaled_dot_product_attention, tensors, set(tensors), rules=False)
    assert ours[0].dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-2)


def test_a_mask_that_moves_is_not_forgotten() -> None:
    tensors = {name: _noise(1, 2, 3, 4, seed=at) for at, name in enumerate(("query", "key", "value"))}
    tensors["attn_mask"] = _noise(1, 2, 3, 3, seed=7)
    _assert_like_pytorch(F.scaled_dot_product_attention, tensors, {"attn_mask"})
    _assert_like_pytorch(F.scaled_dot_product_attention, tensors, {"query", "attn_mask"})


def test_a_mask_together_with_causal_is_refused_as_pytorch_does() -> None:
    tensors = {name: _noise(1, 1, 2, 2) for name in ("query", "key", "value")}
    with pytest.raises(RuntimeError, match="is_causal"):
        _evaluate(
            lambda **qkv: F.scaled_dot_product_attention(**qkv, attn_mask=torch.ones(2, 2).bool(), is_causal=True),
            tensors,
            {"query"},
            rules=True,
        )


def test_without_a_tangent_every_function_is_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("a rule ran without a tangent")

    for function in list(RULES):
        monkeypatch.setitem(RULES, function, never)
    x = _noise(2, 3, 4, dtype=torch.float32)
    with fwAD.dual_level(), ForwardRules():
        F.linear(torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 3, dtype=torch.int64))
        F.layer_norm(x, (4,))
        F.rms_norm(x, (4,))
        F.cross_entropy(x[0], torch.tensor([0, 1, 2]))
        F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(3, 3, dtype=torch.bool))
    with fwAD.dual_level(), ForwardRules(), pytest.raises(AssertionError):
        F.layer_norm(dual(x, x), (4,))


@pytest.mark.parametrize(("moving", "products"), [({"input"}, 2), ({"weight"}, 2), ({"input", "weight"}, 3)], ids=str)
def test_a_linear_costs_one_product_and_one_for_each_tangent(moving: set[str], products: int) -> None:
    with _products() as seen:
        _evaluate(F.linear, {"input": _noise(2, 3, 4), "weight": _noise(5, 4)}, moving, rules=True)
    assert len(seen) == products


def test_frozen_layers_cost_twice_inference_in_products() -> None:
    """The embeddings move, below every layer, and no weight of a linear does; attention has its own test."""
    model = tiny_model("bert")
    batch = tiny_batch()
    labels = batch.pop("labels")
    name = "base_model.model.bert.embeddings.LayerNorm.bias"
    bias = model.get_parameter(name).detach()

    def products(tangent: Tensor | None) -> int:
        rules = ForwardRules() if tangent is not None else nullcontext()
        with torch.no_grad(), fwAD.dual_level(), rules, _products() as seen:
            F.cross_entropy(functional_call(model, {name: dual(bias, tangent)}, kwargs=batch).logits, labels)
        return len([product for product in seen if "bmm" not in product])

    inference = products(None)
    assert inference == 2 * 6 + 2 * 2 * 2 + 2  # per layer: 6 linears, 2 adapters of 2; pooler and classifier
    assert products(torch.ones_like(bias)) == 2 * inference


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
