"""Peak memory is what the allocator hands out, to the byte on the CPU."""

import pytest
import torch
from torch import Tensor

from spry_app.autodiff.memory import MIB, peak_mib


def _floats(mib: float) -> Tensor:
    return torch.empty(int(mib * MIB / 4))


def test_the_peak_counts_what_lives_at_once_and_not_what_came_one_after_another() -> None:
    def one_after_another() -> None:
        for _ in range(5):
            _floats(3)

    def at_once() -> list[Tensor]:
        return [_floats(3) for _ in range(5)]

    assert peak_mib(one_after_another, "cpu") == pytest.approx(3, abs=0.01)
    assert peak_mib(at_once, "cpu") == pytest.approx(15, abs=0.01)


def test_the_peak_counts_temporaries_inside_an_operator() -> None:
    """softmax of a transposed matrix first copies it."""
    x = _floats(4).view(1024, -1).T
    assert peak_mib(lambda: x.softmax(-1), "cpu") == pytest.approx(8, abs=0.05)


def test_what_lived_before_counts_neither_when_kept_nor_when_freed() -> None:
    before = [_floats(8)]

    def step() -> None:
        before.clear()
        _floats(2)

    assert peak_mib(step, torch.device("cpu")) < 2.01
    assert peak_mib(lambda: None, "cpu") == 0


def test_the_step_runs_once() -> None:
    calls: list[int] = []
    peak_mib(lambda: calls.append(1), "cpu")
    assert calls == [1]


@pytest.mark.gpu
def test_the_peak_of_a_cuda_step() -> None:
    def step() -> None:
        torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")

    assert peak_mib(step, "cuda") == pytest.approx(4, abs=0.01)
