"""What the forward rules cost: matrix products counted, memory measured. That they are right is tested elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from derivatives import alone, noise, shared
from tiny_models import tiny_batch, tiny_model
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from spry_app.autodiff.duals import dual
from spry_app.autodiff.forward_rules import ForwardRules
from spry_app.autodiff.memory import peak_mib


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


@pytest.mark.parametrize(
    ("moving", "products"), [({"input"}, 2), ({"weight"}, 2), ({"input", "weight"}, 3)], ids=["input", "weight", "both"]
)
def test_a_linear_costs_one_product_and_one_for_each_tangent(moving: set[str], products: int) -> None:
    tensors = {"input": noise(2, 3, 4), "weight": noise(5, 4)}
    with _products() as seen:
        alone(F.linear, tensors, moving, rules=True)
    assert len(seen) == products


@pytest.mark.parametrize(
    "function",
    [F.linear, lambda x, w: torch.addmm(w[0], x.flatten(0, 1), w), lambda x, w: x @ w],
    ids=["linear", "addmm", "matmul"],
)
def test_a_frozen_weight_costs_one_product_for_all_directions_of_a_pass(function: Callable[..., Tensor]) -> None:
    with _products() as seen:
        shared(lambda x, w: function(x, w), {"x": noise(2, 3, 4), "w": noise(4, 4)}, ["x"])
    assert len(seen) == 2


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


WIDE = {"x": noise(64, 1024, dtype=torch.float32), "y": noise(64, 1024, seed=1, dtype=torch.float32)}
TENSOR_MIB = 0.25


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x * y,
        lambda x, y: x + y[0],
        lambda x, y: x**2,
        lambda x, y: F.silu(x),
        lambda x, y: torch.softmax(x, -1),
        lambda x, y: F.layer_norm(x, (1024,), y[0]),
        lambda x, y: F.rms_norm(x, (1024,), y[0]),
    ],
    ids=["mul", "add", "pow", "silu", "softmax", "layer_norm", "rms_norm"],
)
def test_elementwise_rules_need_no_memory_beyond_their_result(function: Callable[..., Tensor]) -> None:
    """Value and tangent, and one temporary at most; PyTorch's own take up to four."""
    moving = ["x", "y"] if function(**WIDE).equal(WIDE["x"] * WIDE["y"]) else ["x"]
    tangents = len(moving) * TENSOR_MIB  # made by the test
    assert peak_mib(lambda: alone(function, WIDE, moving, rules=True), "cpu") < tangents + 3.2 * TENSOR_MIB
