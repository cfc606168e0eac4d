"""How much memory a step needs above what was there before it. Nothing here predicts."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
T = TypeVar("T")


def with_peak(step: Callable[[], T], device: torch.device | str) -> tuple[T, float]:
    """What `step` returns, and the MiB of tensors alive above its start at its worst moment.

    Counts what the allocator hands out, temporaries inside operators too, and not the process (page cache, libraries).
    """
    gc.collect()
    peak = _cuda_peak if torch.device(device).type == "cuda" else _cpu_peak
    results: list[T] = []
    worst = peak(lambda: results.append(step()), torch.device(device))
    return results[0], worst / MIB


def peak_mib(step: Callable[[], object], device: torch.device | str) -> float:
    """The peak alone; see with_peak."""
    return with_peak(step, device)[1]


def _cuda_peak(step: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def _cpu_peak(step: Callable[[], object], device: torch.device) -> int:
    """PyTorch keeps no peak for the CPU; its profiler records every allocation and release."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorder:
        step()
    assert recorder.profiler is not None and recorder.profiler.kineto_results is not None
    events = [event for event in recorder.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
