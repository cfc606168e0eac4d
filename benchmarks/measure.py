"""Reads clocks and memory, and says on what machine. What is measured comes from variants.py."""

import gc
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.variants import Settings, prepare, variants
from spry_app.autodiff.memory import MIB, peak_mib, return_freed_memory, settle_allocator

ROOT = Path(__file__).parent.parent
FAILURES = (RuntimeError, NotImplementedError)  # out of memory, no rule, no kernel
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Memory:
    """Of one step, above the weights, MiB. activations: what the allocator hands out. resident: what the process grows
    by, None where that cannot be read (Linux and "cpu" only). error: why there is no figure.
    """

    activations: float | None = None
    resident: float | None = None
    weights: float = 0.0
    error: str = ""


def times(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each run in each round, and why a run is left out. The runs take turns, so that noise is shared."""
    seconds: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    for name, run in runs.items():
        try:
            run()
            seconds[name] = []
        except FAILURES as error:
            errors[name] = _reason(error)
    gc.collect()
    gc.freeze()  # what lives now is not looked through again: collecting takes longer than a small step
    for turn in range(rounds if seconds else 0):
        names = list(seconds)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            seconds[name].append(_seconds(runs[name], device))
    gc.unfreeze()
    return seconds, errors


def _seconds(run: Callable[[], object], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios of each round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def memory(settings: Settings, name: str, micro_batch: int, settle: bool = False) -> Memory:
    """In a process of its own, except on "meta", where nothing is left behind. settle: see settle_allocator."""
    if settings.device == "meta":
        return _memory(settings, name, micro_batch, False)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (settings, name, micro_batch, settle))


def _memory(settings: Settings, name: str, micro_batch: int, settle: bool) -> Memory:
    if settle:
        settle_allocator()
    work = prepare(settings)
    run = work.run(variants(settings)[name], micro_batch)
    try:
        resident = _resident_growth(run) if settings.device == "cpu" and sys.platform == "linux" else None
        return Memory(peak_mib(run, settings.device), resident, work.weights_mib)
    except FAILURES as error:
        return Memory(weights=work.weights_mib, error=_reason(error))


def _resident_growth(run: Callable[[], object]) -> float:
    """MiB that the process holds at its worst above what it held before, in its second step.

    The first also loads code and fills the caches of the libraries: 25 to 35 MiB, once in a process.
    """
    run()
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / MIB


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"


def facts(device: str) -> dict[str, object]:
    """Commit, machine and versions."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    cuda = torch.device(device).type == "cuda"
    return {
        "commit": (commit or "unknown") + (" and changes" if changed else ""),
        "machine": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
