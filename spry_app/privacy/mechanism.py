"""The two halves of the Gaussian mechanism over named tensors, in double precision. What is bounded together, and how
much noise that takes, is the caller's.
"""

import hashlib
import math
from collections.abc import Mapping

import torch

from spry_app.autodiff.directions import Tensors
from spry_app.privacy.secret import Secret

_ROUNDING = 1 - 2.0**-23
"""Numbers that are scaled are rounded to fp32, which must not make them longer than the bound."""


def bounded(values: Tensors, most: float) -> Tensors:
    """Scaled down together to the length `most` (L2); themselves where they are no longer."""
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in values.values()))
    if norm <= most:
        return values
    return {name: (value.double() * (most / norm * _ROUNDING)).to(value.dtype) for name, value in values.items()}


def noisy(values: Tensors, std: Mapping[str, float] | float, secret: Secret, *coordinates: str | int) -> Tensors:
    """With N(0, std^2) added to every number; std: of all, or of each tensor by its name.

    The noise follows from the secret, the coordinates and `values` themselves, to the bit: who asks again gets the same
    answer, so a round that is repeated tells no more, and the same noise is never on two different values, whose
    difference would be bare. Adding doubles leaves traces of them in the last bits of the sum (Mironov 2012), which
    this does not hide; rounding to fp32 afterwards leaves fewer.
    """
    content = _digest(values)
    found = {}
    for name, value in values.items():
        normals = torch.from_numpy(secret.normals(value.numel(), *coordinates, content, name)).reshape(value.shape)
        scale = std if isinstance(std, float) else std[name]
        found[name] = (value.double() + scale * normals).to(value.dtype)
    return found


def _digest(values: Tensors) -> str:
    found = hashlib.sha256()
    for name in sorted(values):
        value = values[name].contiguous()
        found.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        found.update(value.numpy().tobytes())
    return found.hexdigest()
