"""Values and tangents of functions, by our rules or by PyTorch's own; alone or several that share a pass. Not a test
itself.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spry_app.autodiff.duals import dual, split
from spry_app.autodiff.forward_rules import ForwardRules

EXACT = {"rtol": 1e-11, "atol": 1e-12}
DIRECTIONS = 3


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tangent_of(name: str, tensors: Mapping[str, Any], k: int = 0) -> Tensor:
    value = tensors[name]
    return noise(*value.shape, seed=50 + list(tensors).index(name) + 10 * k).to(value.dtype)


def alone(
    function: Callable[..., Tensor], tensors: Mapping[str, Any], moving: Collection[str], rules: bool, k: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Value and tangent of function(**tensors) along direction k of those in `moving`.

    Without rules by PyTorch, whose attention has derivatives in its MATH kernel alone.
    """
    with torch.no_grad(), fwAD.dual_level(), ForwardRules() if rules else sdpa_kernel(SDPBackend.MATH):
        moved = {name: dual(tensors[name], tangent_of(name, tensors, k)) for name in moving}
        value, tangent = split(function(**dict(tensors) | moved))
        return value, tangent


def shared(
    function: Callable[..., Tensor], tensors: Mapping[str, Any], moving: Collection[str]
) -> tuple[Tensor, Tensor]:
    """Value, and the tangents along all directions (K, ...), by our rules in one pass."""
    still = {name: value for name, value in tensors.items() if name not in moving}
    own = {name: tensors[name] for name in moving}
    stacked = {n: torch.stack([tangent_of(n, tensors, k) for k in range(DIRECTIONS)]) for n in own}

    def along(tangents: dict[str, Tensor]) -> Any:
        return torch.func.jvp(lambda moved: function(**{n: (still | moved)[n] for n in tensors}), (own,), (tangents,))

    with torch.no_grad(), ForwardRules():
        values, tangents = torch.func.vmap(along, randomness="same")(stacked)
    return values[0], tangents


def assert_like_pytorch(
    function: Callable[..., Tensor], tensors: Mapping[str, Any], moving: Collection[str], **tolerance: float
) -> None:
    """By our rules, alone and shared, as by PyTorch's own, a direction at a time; and no operand was written to."""
    before = {name: value.clone() for name, value in tensors.items() if isinstance(value, Tensor)}
    truth = [alone(function, tensors, moving, rules=False, k=k) for k in range(DIRECTIONS)]
    torch.testing.assert_close(alone(function, tensors, moving, rules=True), truth[0], **(tolerance or EXACT))
    together = truth[0][0], torch.stack([tangent for _, tangent in truth])  # type: ignore[misc]
    torch.testing.assert_close(shared(function, tensors, moving), together, **(tolerance or EXACT))
    assert all(torch.equal(tensors[name], value) for name, value in before.items())


def subsets(names: str) -> list[tuple[str, ...]]:
    """All but the empty one."""
    letters = names.split()
    return [tuple(n for at, n in enumerate(letters) if bits >> at & 1) for bits in range(1, 2 ** len(letters))]
