"""Directions that share a pass: what they cost, and that a model which cannot bear it is refused, never trained on."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import MODELS, tiny_batch, tiny_model, trainables
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from spry_app.autodiff.directions import Seed
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.autodiff.self_check import SelfTestError, shared_pass_test
from spry_app.autodiff.slopes import Objective, Part

SEED = Seed(1, 2, 3, 4)
FORWARD = GRADIENTS["forward-mode"]


def case(model: nn.Module, examples: int, length: int) -> tuple[Objective, dict[str, Tensor]]:
    batch = tiny_batch(examples, length)
    labels = batch.pop("labels")
    return lambda own: F.cross_entropy(functional_call(model, own, kwargs=batch).logits, labels), trainables(model)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_models_pass(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    objective, params = case(model, 2, 9)
    shared_pass_test(lambda own: objective(own).float(), params, model)


class Square(torch.autograd.Function):
    """A custom operation with a forward derivative, written in the way that torch.func cannot batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_forward(x)
        return x * x

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * tangent


def test_a_model_that_cannot_be_batched_is_refused_with_the_key_to_change() -> None:
    with pytest.raises(SelfTestError, match=r"set client\.directions-at-once = 1"):
        shared_pass_test(lambda own: Square.apply(own["x"]).sum(), {"x": torch.ones(3)}, None)


def test_slopes_that_change_when_shared_are_refused() -> None:
    """A loss that, from its second call on, is another one: alone and together disagree."""
    calls = []

    def objective(own: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        return own["x"].square().sum() * (1.0 if len(calls) <= 2 else 1.5)

    with pytest.raises(SelfTestError, match="in one pass"):
        shared_pass_test(objective, {"x": torch.ones(3)}, None)


class Products(TorchDispatchMode):
    """Multiply-adds of matrix products whose weight has `width` rows or columns on both sides (frozen layers)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        name = str(func)
        if name.startswith(("aten.mm", "aten.bmm", "aten.addmm", "aten.matmul")):
            left, right = [a for a in args if isinstance(a, Tensor)][-2:]
            self.count += left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("directions", [2, 4, 8])
def test_directions_that_share_a_pass_cost_one_pass_each_and_one_more(directions: int) -> None:
    """n directions at once: (1 + n) / 2n of the products of n directions one by one, within 15 % (LoRA, attention)."""
    objective, params = case(tiny_model("bert"), 8, 16)
    counts = []
    for at_once in (1, directions):
        with Products() as products:
            FORWARD.estimate([Part(objective, 1.0)], params, SEED, directions, at_once)
        counts.append(products.count)
    assert counts[1] / counts[0] == pytest.approx((1 + directions) / (2 * directions), rel=0.15)
