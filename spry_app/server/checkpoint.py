"""A run's state between two rounds, on disk: written whole or not at all, so that a run can go on where it ended. What
its rounds were is in metrics.jsonl (record.py).
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spry_app.autodiff.directions import Tensors
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.protocol import mismatch

NAME = "checkpoint.safetensors"
CHANGEABLE = (
    "num-server-rounds",
    "server.wait-timeout-s",
    "server.round-timeout-s",
    "stop.",
    "telemetry.",
    "resume",
    "output-dir",
    "offline",
    "data.cache-mib",
)
"""Keys, or beginnings of keys, that need not be those of the run that is resumed; the first one must where step sizes
follow from it.
"""


GROUPS = ("tensors", "moments", "update", "weighting")
"""Of the tensors of a checkpoint."""


@dataclass(frozen=True)
class Progress:
    """round: the last that ended. state_round: the last that changed the tensors. barren_rounds: in a row."""

    round: int
    state_round: int
    barren_rounds: int


@dataclass(frozen=True)
class Checkpoint:
    """tensors: all trainable ones. moments: of the server's optimizer. update: by the last round that changed them.
    weighting: what the weights of replies depend on (combining.py). limits: MiB that a step may take on nodes that were
    out of memory (fleet.py); a node that comes back under another id starts anew.
    """

    progress: Progress
    tensors: Tensors
    moments: Tensors
    update: Tensors
    weighting: Tensors = field(default_factory=dict)
    limits: Mapping[int, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Replace the one in `folder`."""
        flat = {f"{group}:{name}": value for group in GROUPS for name, value in getattr(self, group).items()}
        fresh = folder / f"{NAME}.new"
        about = {"progress": asdict(self.progress), "limits": dict(self.limits)}
        save_file(flat, fresh, {name: json.dumps(value) for name, value in about.items()})
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        fresh.replace(folder / NAME)

    def check(self, start: Tensors) -> None:
        """That it is of a model which trains tensors like `start`. Raises SpryError."""
        if reason := mismatch(self.tensors, start):
            raise SpryError(f"The run cannot be resumed: its {NAME} is of another model ({reason}).")


def load(folder: Path, config: RunConfig) -> Checkpoint:
    """Raises SpryError where there is none, or its run had other settings than `config` in a key that matters."""
    _check(folder, config)
    groups: dict[str, Tensors] = {group: {} for group in GROUPS}
    try:
        with safe_open(folder / NAME, framework="pt") as file:
            about = {name: json.loads(value) for name, value in file.metadata().items()}
            progress = Progress(**about["progress"])
            limits = {int(node): float(mib) for node, mib in about.get("limits", {}).items()}
            if not all(0 < mib < math.inf for mib in limits.values()):
                raise ValueError(f"its limits of memory are {limits}")
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                group, _, name = key.partition(":")
                groups[group][name] = file.get_tensor(key)
        _check_content(progress, **groups)
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise SpryError(f"{folder} cannot be resumed: its {NAME} cannot be read ({error}).") from None
    if progress.round >= config.num_server_rounds:
        raise SpryError(
            f"{folder} has run its {progress.round} rounds; to go on, raise num-server-rounds "
            f"(now {config.num_server_rounds})."
        )
    return Checkpoint(progress, **groups, limits=limits)


def _check_content(progress: Progress, tensors: Tensors, moments: Tensors, update: Tensors, weighting: Tensors) -> None:
    """What can be said of a checkpoint without its model; whether it is of that one, its optimizer says. Raises
    ValueError.
    """
    if not all(type(number) is int and number >= 0 for number in asdict(progress).values()):
        raise ValueError(f"its rounds are {progress}")
    if update and {n: t.shape for n, t in update.items()} != {n: t.shape for n, t in tensors.items()}:
        raise ValueError("its last update is not one of its tensors")
    for name, value in (moments | update | weighting).items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} has a number that is not finite")


def _check(folder: Path, config: RunConfig) -> None:
    """Raises SpryError where `folder` is not that of a run, or of one with other settings."""
    try:
        before: Mapping[str, Any] = dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise SpryError(f"resume={str(folder)!r} is not the folder of a run ({error}).") from None
    now, changeable = config.flat(), CHANGEABLE if config.schedule == "constant" else CHANGEABLE[1:]
    changed = [
        f"{key}={now.get(key)!r} (it was {before.get(key)!r})"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key) and not key.startswith(changeable)
    ]
    if changed:
        raise SpryError(
            f"{folder} cannot be resumed with {', '.join(changed)}: the result would be that of neither run. Only "
            f"{', '.join(changeable[: changeable.index('stop.') + 1])}* may change."
        )
