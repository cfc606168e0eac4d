"""`spry doctor`: what this box can do, and what it will choose. It changes nothing and downloads nothing."""

from collections.abc import Iterator
from pathlib import Path

from spry_app.doctor.connection import superlink
from spry_app.doctor.machine import accelerator, attention, clock, disk, memory, software
from spry_app.doctor.training import QUANTIZATIONS, training
from spry_app.findings import Check, Finding


def examine(
    device: str = "auto",
    quantization: str = "none",
    address: str = "",
    root_certificates: Path | None = None,
    insecure: bool = False,
) -> Iterator[tuple[str, Finding]]:
    """Name and finding of each check, as they come.

    device, quantization: as model.device and model.quantization of a run; other quantisations are tried too, but may
    fail. address: of a SuperLink, host:port; "" asks none.
    """
    checks: dict[str, Check] = {
        "software": software,
        "accelerator": lambda: accelerator(device),
        "attention": lambda: attention(device),
        "memory": lambda: memory(device),
        "disk": disk,
        "clock": clock,
    }
    for kind in QUANTIZATIONS:
        name = "forward mode" if kind == "none" else f"weights in {kind}"
        checks[name] = lambda kind=kind: training(kind, device, kind in ("none", quantization))  # type: ignore[misc]
    if address:
        checks["superlink"] = lambda: superlink(address, root_certificates, insecure)
    for name, check in checks.items():
        found = check()
        yield name, found
        if name == "accelerator" and found.level == "problem":
            return


__all__ = ["QUANTIZATIONS", "Finding", "examine"]
