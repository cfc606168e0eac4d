"""What feeds this node's machine, as its system tells: battery, mains, and the limit of what it computes on. Asks no
more of a system than its files, and of a GPU's driver than its own tool.
"""

import math
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

RAPL = Path("/sys/class/powercap")
"""Where Linux has the limits of Intel's and AMD's processors."""
MOST_S = 5.0
"""For nvidia-smi: a driver that does not answer must not hold a node up."""


@dataclass(frozen=True)
class Power:
    """None: not known. battery_percent: charge; plugged: whether on mains. limit_w: watts that the accelerator, or else
    the processor, may take for long.
    """

    battery_percent: float | None = None
    plugged: bool | None = None
    limit_w: float | None = None


def power_of(device: torch.device) -> Power:
    """Of this machine, which computes on `device`."""
    percent = plugged = None
    with suppress(OSError, ValueError):  # what the system tells of a battery may be anything
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        if battery is not None and 0 <= battery.percent <= 100:
            percent, plugged = float(battery.percent), battery.power_plugged
    if device.type != "cuda":
        return Power(percent, plugged, cpu_limit_w(RAPL))
    return Power(percent, plugged, gpu_limit_w(f"GPU-{torch.cuda.get_device_properties(device).uuid}"))


def cpu_limit_w(root: Path) -> float | None:
    """Of all packages of the machine together; None where one does not tell. Beside them a laptop has a zone of the
    whole platform ("psys"), of which they are a part.
    """
    try:
        zones = [folder for folder in root.glob("*-rapl:*") if folder.name.count(":") == 1]
        packages = [folder for folder in zones if (folder / "name").read_text().startswith("package")]
        microwatts = [int((folder / "constraint_0_power_limit_uw").read_text()) for folder in packages]
    except (OSError, ValueError):
        return None
    return _positive(sum(microwatts) / 1e6)


def gpu_limit_w(uuid: str) -> float | None:
    """Of an NVIDIA GPU; None where its driver has no such limit (a Jetson's) or no tool."""
    command = ["nvidia-smi", f"--id={uuid}", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        return _positive(float(subprocess.run(command, capture_output=True, text=True, timeout=MOST_S).stdout))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _positive(watts: float) -> float | None:
    return watts if 0 < watts < math.inf else None
