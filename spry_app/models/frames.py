"""Fixed orthonormal factors for matrices: drawn from a seed, the same bits on every machine, or taken from the weights.
What is trained between them is not known here.
"""

import math
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spry_app.autodiff import gaussian, orthogonal
from spry_app.autodiff.directions import Tensors
from spry_app.autodiff.random_words import generator

Words = npt.NDArray[np.uint64]
SMALL = 1024
"""A matrix with a side up to this has its exact singular vectors; a larger one those of a projection."""
OVERSAMPLING, POWERS = 16, 4
_PURPOSE = b"spry subspace"


def words(coordinates: str, count: int) -> Words:
    """Random 64-bit words, equal for equal coordinates, on every machine."""
    return generator(coordinates, _PURPOSE).random_raw(count)


def signs(coordinates: str, count: int) -> npt.NDArray[np.int8]:
    """+1 or -1."""
    return orthogonal.signs(generator(coordinates, _PURPOSE), count)


def frame(dimension: int, count: int, coordinates: str) -> Tensor:
    """Orthonormal rows, shape (count, dimension), fp32, the same bits on every machine; count is at most dimension."""
    assert 1 <= count <= dimension, (count, dimension)
    whole, length = orthogonal.Frame(f"subspace {coordinates}", dimension), 1 / math.sqrt(dimension)
    return torch.from_numpy(np.stack([whole.columns({number: length}) for number in range(count)]))


def hadamard(size: int) -> Tensor:
    """The Walsh-Hadamard matrix of +1 and -1; size must be a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def normals(coordinates: str, shape: torch.Size) -> Tensor:
    """N(0, 1), fp32, the same bits on every machine."""
    drawn = gaussian.normals(generator(coordinates, _PURPOSE), shape.numel())
    return torch.from_numpy(drawn).view(shape)


def singular(layers: Mapping[str, nn.Module], rank: int, seed: int) -> Tensors:
    """Name of a frozen linear layer -> its first singular vectors, as rows of "<name>.U" and "<name>.V", fp32, CPU.

    Those of the weight as it computes with it, dequantised. The largest number of each row of U is positive.
    """
    found: Tensors = {}
    for name, layer in layers.items():
        u, v = _singular(_weight(layer), rank, name, seed)
        sign = u.gather(1, u.abs().argmax(1, keepdim=True)).sign()
        found[f"{name}.U"], found[f"{name}.V"] = (u * sign).cpu().contiguous(), (v * sign).cpu().contiguous()
    return found


def _weight(layer: nn.Module) -> Tensor:
    """Shape (outputs, inputs), fp32."""
    dense: Callable[[torch.dtype], Tensor] | None = getattr(layer, "dense_weight", None)
    if dense is not None:
        return dense(torch.float32).detach()
    weight = cast(Tensor, layer.weight).detach().float()
    return weight.T if isinstance(layer, Conv1D) else weight


def _singular(weight: Tensor, rank: int, name: str, seed: int) -> tuple[Tensor, Tensor]:
    """Rows u (rank, outputs), v (rank, inputs). Large ones by subspace iteration (arXiv 0909.4061, algorithm 4.4)."""
    if min(weight.shape) <= SMALL:
        u, _, v = torch.linalg.svd(weight, full_matrices=False)
        return u.T[:rank], v[:rank]
    test = normals(f"{seed} {name} test", torch.Size((weight.shape[1], min(rank + OVERSAMPLING, *weight.shape))))
    basis = torch.linalg.qr(weight @ test.to(weight.device)).Q
    for _ in range(POWERS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    u, _, v = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return (basis @ u).T[:rank], v[:rank]
