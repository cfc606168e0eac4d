"""Frames and maps by themselves: orthonormal, the same bits everywhere, and of the length that they promise."""

import hashlib
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spry_app.models import frames as frames_module
from spry_app.models.frames import frame, hadamard, signs, singular, words
from spry_app.models.shared_vector import Picked, Transformed


@pytest.mark.parametrize("dimension", [1, 2, 3, 6, 7, 16, 24, 100, 384])
def test_a_random_frame_is_orthonormal_in_any_dimension(dimension: int) -> None:
    rows = frame(dimension, min(dimension, 9), "somewhere")
    torch.testing.assert_close(rows.double() @ rows.double().T, torch.eye(len(rows)).double(), rtol=0, atol=1e-6)
    assert not torch.equal(rows, frame(dimension, len(rows), "elsewhere")) or dimension < 4


def test_frames_have_the_same_bits_everywhere() -> None:
    """Golden values: they are part of what old runs are rebuilt from."""
    assert words("golden", 2).tolist() == [4081551478341949320, 10525953249410716756]
    assert signs("golden", 12).tolist() == [-1, 1, 1, 1, -1, 1, 1, 1, -1, -1, 1, -1]
    assert frame(6, 2, "golden").mul(2).round().tolist() == [[-1, 1, 0, -1, 0, -1], [-1, -1, -1, 0, -1, 0]]
    digest = hashlib.sha256(frame(384, 8, "golden").numpy().tobytes()).hexdigest()
    assert digest == "a05ac01dbb087d4d724f982d44952c2fed57c643ff145843b013b61590ec60f3"


@pytest.mark.parametrize("layer", [nn.Linear(40, 30), Conv1D(30, 40)], ids=["linear", "conv1d"])
@pytest.mark.parametrize("small", [1024, 4])
def test_singular_frames_are_those_of_the_weight(
    small: int, layer: nn.Linear | Conv1D, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a matrix whose values fall off, exactly and by projection; U W V' is the diagonal of the first values."""
    monkeypatch.setattr(frames_module, "SMALL", small)
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(30, 40, generator=generator), full_matrices=False)
    values = 2.0 ** -torch.arange(30)
    weight = u * values @ v
    layer.weight.data = weight.T if isinstance(layer, Conv1D) else weight
    found = singular({"x": layer}, 3, seed=0)
    torch.testing.assert_close(found["x.U"] @ weight @ found["x.V"].T, torch.diag(values[:3]), rtol=1e-3, atol=1e-4)
    assert all(row[row.abs().argmax()] > 0 for row in found["x.U"])


@pytest.mark.parametrize("size", [1, 2, 32])
def test_a_hadamard_matrix_has_orthogonal_rows_of_plus_and_minus_one(size: int) -> None:
    matrix = hadamard(size)
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size))
    assert torch.equal(matrix.abs(), torch.ones(size, size))


def test_the_random_map_keeps_lengths_in_the_mean() -> None:
    """Over 400 draws each entry of P' P is within 5 standard errors of the identity's; d below and above a tensor."""
    start = {"a": torch.zeros(3, 5, dtype=torch.float64), "b": torch.zeros(7, dtype=torch.float64)}
    for size in (3, 9):
        products = []
        for seed in range(400):
            maps = Transformed.maps(seed, {name: value.numel() for name, value in start.items()}, size)
            vector = Transformed([torch.zeros(size, dtype=torch.float64)], start, maps)
            moved = [vector.tensors(row) for row in torch.eye(size).double()]
            p = torch.stack([torch.cat([part.flatten() for part in tensors.values()]) for tensors in moved], dim=1)
            products.append((p.T @ p).detach())
        drawn = torch.stack(products)
        error = drawn.std(0) / math.sqrt(len(products)) + 1e-9
        assert ((drawn.mean(0) - torch.eye(size)).abs() <= 5 * error).all()
        assert drawn[:, 0, 1].std() > 0.05  # it is random


def test_every_coordinate_of_a_shared_vector_stands_for_about_as_many_numbers() -> None:
    for size in (1, 13, 99, 100):
        maps = Picked.maps(0, {"a": 30, "b": 50, "c": 20}, size)
        uses = torch.bincount(torch.cat(list(maps.values())), minlength=size)
        assert (uses.min(), uses.max()) == (100 // size, -(-100 // size))
    assert not torch.equal(maps["a"], maps["a"].sort().values)
