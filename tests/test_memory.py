"""Peak memory is what the allocator hands out, to the byte on the CPU, and the same without data."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spry_app.autodiff.memory import MIB, peak_mib, with_peak


def _floats(mib: float, device: str = "cpu") -> Tensor:
    return torch.empty(int(mib * MIB / 4), device=device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_counts_what_lives_at_once_and_not_what_came_one_after_another(device: str) -> None:
    def one_after_another() -> None:
        for _ in range(5):
            _floats(3, device)

    def at_once() -> list[Tensor]:
        return [_floats(3, device) for _ in range(5)]

    assert peak_mib(one_after_another, device) == pytest.approx(3, abs=0.01)
    assert peak_mib(at_once, device) == pytest.approx(15, abs=0.01)


def test_the_peak_counts_temporaries_inside_an_operator() -> None:
    """softmax of a transposed matrix first copies it."""
    x = _floats(4).view(1024, -1).T
    assert peak_mib(lambda: x.softmax(-1), "cpu") == pytest.approx(8, abs=0.05)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_lived_before_counts_neither_when_kept_nor_when_freed(device: str) -> None:
    before = [_floats(8, device)]

    def step() -> None:
        before.clear()
        _floats(2, device)

    assert peak_mib(step, torch.device(device)) < 2.01
    assert peak_mib(lambda: None, device) == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_views_and_results_in_place_take_nothing(device: str) -> None:
    weight = _floats(8, device).view(1024, -1)

    def step() -> list[Tensor]:
        copy = weight.clone()
        return [weight.T[:5], weight.add_(1), copy.mul_(2).flatten(), copy[None].expand(3, -1, -1)]

    assert peak_mib(step, device) == pytest.approx(8, abs=0.01)


def test_without_data_a_number_that_is_read_is_zero() -> None:
    def step() -> tuple[list[float], float, bool, Tensor]:
        x = _floats(1, "meta")
        return x[:2].tolist(), x.sum().item(), bool((x > 0).all()), x[:3].cpu()

    (first, total, truth, copy), peak = with_peak(step, "meta")
    assert (first, total, truth) == ([0.0, 0.0], 0.0, False)
    assert torch.equal(copy, torch.zeros(3))
    assert peak == pytest.approx(1.25, abs=0.01)  # with one byte for each comparison


@pytest.mark.parametrize("dropout, causal", [(0.0, False), (0.0, True), (0.5, False)])
def test_without_data_attention_takes_the_memory_of_the_kernel_of_the_cpu(dropout: float, causal: bool) -> None:
    """The fused one keeps no scores, 4 MiB here, and has below 1 MiB of its own; dropout needs the other one."""

    def step(device: str) -> float:
        query = torch.empty(1, 4, 512, 64, device=device).fill_(0.1).requires_grad_(True)

        def both_ways() -> None:
            F.scaled_dot_product_attention(query, query, query, dropout_p=dropout, is_causal=causal).sum().backward()

        return peak_mib(both_ways, device)

    assert step("meta") == pytest.approx(step("cpu"), abs=1)
    assert F.scaled_dot_product_attention(*torch.ones(3, 1, 2, 4)).sum() == 8  # PyTorch's own is back in its place


HOLES = """
import sys, torch
from spry_app.autodiff.memory import return_freed_memory, settle_allocator

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024

if "settle" in sys.argv and not settle_allocator():
    sys.exit("no glibc")
del (_ := [torch.ones(1 << 20)])[:]  # from here on glibc by itself takes smaller blocks from its heap
kept = [torch.ones(1 << 16) for _ in range(256)]
before = resident()
del kept[::2]
if "return" in sys.argv:
    return_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("cure", ["settle", "return"])
def test_the_system_gets_back_what_lies_between_living_tensors(cure: str) -> None:
    """128 tensors of 256 KiB are freed, every second one of a row: 32 MiB, of which glibc's heap would return none."""
    run = subprocess.run([sys.executable, "-c", HOLES, cure], capture_output=True, text=True)
    if "no glibc" in run.stderr:
        pytest.skip("the C library is not glibc")
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) > 28


def test_the_step_runs_once() -> None:
    calls: list[int] = []
    peak_mib(lambda: calls.append(1), "cpu")
    assert calls == [1]


@pytest.mark.gpu
def test_the_peak_of_a_cuda_step() -> None:
    def step() -> None:
        torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")

    assert peak_mib(step, "cuda") == pytest.approx(4, abs=0.01)
