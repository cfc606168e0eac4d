"""A rule sees the tangents of all directions beside one value, and gives the same in whatever way they are wrapped."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from derivatives import EXACT, noise
from torch import Tensor

from spry_app.autodiff.duals import split
from spry_app.autodiff.fans import Fan, along
from spry_app.autodiff.forward_rules import ForwardRules
from spry_app.autodiff.slopes import Part, forward_mode

W = {"w": noise(4, 3, seed=1), "b": noise(4, seed=2)}
X = noise(5, 3)
V = [{name: noise(*tensor.shape, seed=10 + k) for name, tensor in W.items()} for k in range(3)]


def layers(x: Tensor, own: dict[str, Tensor]) -> Tensor:
    """Products, sums, a norm, attention and softmax, of one example (3,) or several (5, 3)."""
    h = F.linear(x, own["w"], own["b"])
    h = F.layer_norm(h * torch.sigmoid(h) + 1, (4,), own["b"])
    q = h.view(-1, 2, 2)
    h = F.scaled_dot_product_attention(q, q + 1, q).flatten(-2)
    return torch.softmax(h**2, -1)


def loss(own: dict[str, Tensor]) -> Tensor:
    return layers(X, own).square().sum()


def by_torch_vmap(own: dict[str, Tensor]) -> Tensor:
    """A model that uses torch.vmap itself, inside of which rules are PyTorch's own."""

    def one(x: Tensor, row: Tensor) -> Tensor:
        h = F.layer_norm(F.linear(x, own["w"], own["b"]) * 2 + 1, (4,), own["b"])
        return torch.where(row - 1 > 0, h @ own["w"], own["w"].sum(0)).softmax(-1)

    return torch.func.vmap(one)(X, torch.arange(5)).square().sum() + loss(own)


def truth(objective: Callable[[dict[str, Tensor]], Tensor]) -> list[float]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in W.items()}
    grads = dict(zip(leaves, torch.autograd.grad(objective(leaves), list(leaves.values())), strict=True))
    return [sum((grads[name] * t).sum().item() for name, t in v.items()) for v in V]


@pytest.mark.parametrize("objective", [loss, by_torch_vmap])
@pytest.mark.parametrize("at_once", [1, 3])
def test_slopes_are_backprops_alone_and_shared_and_in_a_model_with_its_own_vmap(
    objective: Callable[[dict[str, Tensor]], Tensor], at_once: int
) -> None:
    _, slopes = forward_mode([Part(objective, 1.0)], W, V, at_once)
    assert slopes == pytest.approx(truth(objective), rel=1e-10)


def test_rules_work_in_torch_func_as_the_published_code_takes_slopes() -> None:
    with ForwardRules():
        slopes = [torch.func.jvp(loss, (W,), (v,))[1].item() for v in V]
    assert slopes == pytest.approx(truth(loss), rel=1e-10)


def test_directions_as_the_last_axis_or_the_same_for_all() -> None:
    """torch.vmap may put its axis anywhere, and an operand's tangent need not have it."""
    last = torch.stack([v["w"] for v in V], -1)

    def value_and_tangent(w: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda own: layers(X, own), (W,), ({"w": w, "b": V[0]["b"]},))

    with torch.no_grad():
        expected = torch.func.vmap(lambda w: value_and_tangent(w)[1], in_dims=-1)(last)
        with ForwardRules():
            values, tangents = torch.func.vmap(value_and_tangent, in_dims=-1)(last)
    torch.testing.assert_close(values[0], layers(X, W), **EXACT)
    torch.testing.assert_close(tangents, expected, **EXACT)


def test_a_kernel_gets_plain_tensors_once_for_all_directions() -> None:
    """What it computes of the value is computed once, and in-place operations are allowed."""
    seen = []

    def kernel(x: Fan) -> tuple[Tensor, Tensor]:
        value, tangents = x
        seen.append((value.shape, tangents.shape))  # type: ignore[union-attr]
        out = torch.zeros(3).add_(value)
        return out, torch.zeros(len(tangents), 3).add_(tangents)  # type: ignore[arg-type]

    def function(own: dict[str, Tensor]) -> Tensor:
        return along(kernel, split(own["x"])).sum()

    x, v = {"x": torch.ones(3)}, [{"x": torch.full((3,), float(k))} for k in range(4)]
    assert forward_mode([Part(function, 1.0)], x, v, 4)[1] == [0.0, 3.0, 6.0, 9.0]
    assert seen == [((3,), (4, 3))]
    assert forward_mode([Part(function, 1.0)], x, v, 1)[1] == [0.0, 3.0, 6.0, 9.0]
    assert seen[1:] == [((3,), (1, 3))] * 4
