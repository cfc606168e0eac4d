"""Dual numbers, a value with its tangent: the typed door to torch.autograd.forward_ad. No rule of calculus is here."""

from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

Pair = tuple[Any, Tensor | None]
"""A value and its tangent. None stands for zero; what is no tensor has none."""


def dual(primal: Tensor, tangent: Tensor | None) -> Tensor:
    """A dual number of the level that is open (`fwAD.dual_level`)."""
    if tangent is None:
        return primal
    made: Tensor = fwAD.make_dual(primal, tangent)  # type: ignore[no-untyped-call]
    return made


def split(value: Any) -> Pair:
    """Value and tangent of anything; outside of a level nothing has a tangent."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value, None
    primal, tangent = fwAD.unpack_dual(value)  # type: ignore[no-untyped-call]
    return primal, tangent


def wide(tensor: Tensor) -> Tensor:
    """In the format in which statistics, softmax and losses are computed: fp32 for half formats."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
