"""What this machine is: software, processor, memory, disk, clock. Nothing is loaded or connected to here."""

import os
import platform
import shutil
import subprocess
import tempfile
import time
import warnings
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
import torch.nn.functional as F
from packaging.requirements import Requirement
from torch.nn.attention import SDPBackend, sdpa_kernel

from spry_app.autodiff.memory import MIB
from spry_app.client.slicing import AUTO_PART
from spry_app.errors import SpryError
from spry_app.findings import Finding, Values
from spry_app.models.checkpoint import find_device
from spry_app.models.room import free_bytes

LITTLE_MEMORY_MIB = 512
LITTLE_DISK_MIB = 2048
GIB = 1024**3


def software() -> Finding:
    """Installed versions against those that this package asks for."""
    wanted = [Requirement(line) for line in requires("spry") or ()]
    wrong, found = list[str](), {"python": platform.python_version()}
    for need in wanted:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            found[need.name] = version(need.name)
        except PackageNotFoundError:
            wrong.append(f"{need.name} is missing (wanted: {need.name}{need.specifier})")
            continue
        if not need.specifier.contains(found[need.name], prereleases=True):
            wrong.append(f"{need.name} is {found[need.name]} (wanted: {need.specifier})")
    if wrong:
        return Finding("problem", f"{'; '.join(wrong)}. Run `pip install --upgrade spry`.", found)
    named = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "flwr", "transformers", "peft"))
    return Finding("ok", f"{named}.", found)


def accelerator(device: str) -> Finding:
    """What model.device chooses here."""
    try:
        chosen = find_device(device)
    except SpryError as error:
        return Finding("problem", str(error))
    if chosen.type == "cuda":
        about = torch.cuda.get_device_properties(chosen)
        arch = f"sm_{about.major}{about.minor}"
        values: Values = {
            "device": str(chosen),
            "name": about.name,
            "architecture": arch,
            "mib": about.total_memory // MIB,
        }
        if arch not in torch.cuda.get_arch_list() and not _runs_kernel(chosen):
            return Finding(
                "problem",
                f"{about.name} is {arch}, for which this torch has no kernels (it has "
                f"{', '.join(torch.cuda.get_arch_list())}): install a torch that is built for it.",
                values,
            )
        return Finding("ok", f"{about.name}, {arch}, {about.total_memory / GIB:.1f} GiB.", values)
    cores = len(os.sched_getaffinity(0))
    values = {"device": "cpu", "cores": cores, "threads": torch.get_num_threads(), "machine": platform.machine()}
    said = "no GPU that torch can use; " if device == "auto" else ""
    return Finding("ok", f"CPU ({said}{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads).", values)


def _runs_kernel(device: torch.device) -> bool:
    try:
        return bool((torch.ones(8, device=device) * 2).sum().item() == 16)
    except RuntimeError:
        return False


def attention(device: str) -> Finding:
    """Which kernels of scaled_dot_product_attention run here."""
    where = find_device(device)
    query = torch.zeros(1, 2, 16, 64, device=where, dtype=torch.float16 if where.type == "cuda" else torch.float32)
    kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
    running = [kernel.name.lower() for kernel in kernels if _attends(query, kernel)]
    said = "Tangents go through attention in blocks of its own, on every device; other passes use "
    if not running:
        return Finding("problem", f"{where} runs no kernel of scaled_dot_product_attention.")
    return Finding("ok", f"{said}{running[0]} (here run: {', '.join(running)}).", {"kernels": " ".join(running)})


@torch.no_grad()
def _attends(query: torch.Tensor, kernel: SDPBackend) -> bool:
    try:
        with warnings.catch_warnings(), sdpa_kernel(kernel):
            warnings.simplefilter("ignore")  # why a kernel does not run
            return bool(F.scaled_dot_product_attention(query, query, query).isfinite().all())
    except RuntimeError:
        return False


def memory(device: str) -> Finding:
    """What is free, and what a budget of "auto" would take of it."""
    free = free_bytes(find_device(device)) / MIB
    budget = free * AUTO_PART
    values: Values = {"free-mib": round(free), "auto-budget-mib": round(budget)}
    said = f'{free:,.0f} MiB are free; client.memory-budget-mib="auto" would let a step take {budget:,.0f} MiB.'
    if free < LITTLE_MEMORY_MIB:
        return Finding("problem", f"{said} Python and torch alone need more than {LITTLE_MEMORY_MIB} MiB.", values)
    return Finding("ok", said, values)


def disk() -> Finding:
    """Of the folder for temporary files and that for checkpoints from the Hub."""
    folders = {"temporary files": Path(tempfile.gettempdir()), "models": _existing(_hub_cache())}
    values, low = dict[str, int](), list[str]()
    for what, folder in folders.items():
        free = shutil.disk_usage(folder).free / MIB
        values[what.replace(" ", "-") + "-free-mib"] = round(free)
        if not os.access(folder, os.W_OK):
            return Finding("problem", f"{folder} ({what}) cannot be written to.", values)
        if free < LITTLE_DISK_MIB:
            low.append(f"{folder} ({what}) has {free:,.0f} MiB left")
    if low:
        return Finding("note", f"{'; '.join(low)}: little for a checkpoint.", values)
    said = "; ".join(f"{what}: {shutil.disk_usage(folder).free / GIB:.1f} GiB" for what, folder in folders.items())
    return Finding("ok", f"Free for {said}.", values)


def _hub_cache() -> Path:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub"))


def _existing(folder: Path) -> Path:
    """It, or the nearest folder above it that there is."""
    return folder if folder.is_dir() else _existing(folder.parent)


def clock() -> Finding:
    """A clock that is behind makes certificates look as if they were not valid yet."""
    installed, now = Path(torch.__file__).stat().st_mtime, time.time()
    said = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    values = {"now": said}
    if now < installed - 86_400:
        return Finding(
            "problem",
            f"The clock says {said}, which is before the programs here were installed: set it (e.g. `timedatectl "
            "set-ntp true`), or TLS will refuse every certificate.",
            values,
        )
    synchronised = _synchronised()
    if synchronised is None:
        return Finding("ok", f"{said}; whether it is synchronised is not known here.", values)
    if not synchronised:
        return Finding("note", f"{said}; it is not synchronised (`timedatectl set-ntp true`).", values)
    return Finding("ok", f"{said}, synchronised.", values)


def _synchronised() -> bool | None:
    program = shutil.which("timedatectl")
    if program is None:
        return None
    command = [program, "show", "--property=NTPSynchronized", "--value"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip() == "yes" if done.returncode == 0 and done.stdout.strip() else None
