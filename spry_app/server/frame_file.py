"""The part of an adapter that the server alone computes, in the folder of its run: what a resumed run, and one rebuilt
from its log, must take as it was. How it is computed is not known here.
"""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.models import SENT, Fixed

NAME = "frame.safetensors"


def save_frame(frame: Fixed | None, folder: Path) -> None:
    """Where there is one."""
    if frame is not None:
        save_file(frame.tensors, folder / NAME)


def load_frame(folder: Path, config: RunConfig) -> Fixed | None:
    """None for a run without one. Raises SpryError where it cannot be read."""
    if config.adapter.frame not in SENT:
        return None
    try:
        return Fixed.of(load_file(folder / NAME))
    except (OSError, SafetensorError) as error:
        raise SpryError(
            f"{folder / NAME} cannot be read ({error}). A run with adapter.frame={config.adapter.frame!r} keeps its "
            "fixed factors there; computed again, they might not be the same to the bit."
        ) from None
