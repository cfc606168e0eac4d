"""Finding the processes that a command has left behind."""

from collections.abc import Iterator
from pathlib import Path

import psutil


def left_running(folder: Path) -> list[str]:
    """Command lines of the living processes that were started with `folder` as TMPDIR, or that work below it."""
    return sorted(" ".join(process.cmdline())[:120] for process in _living() if _belongs(process, folder))


def _living() -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.NoSuchProcess:
            continue


def _belongs(process: psutil.Process, folder: Path) -> bool:
    """Ray's workers write their title over their environment; they keep the directory they were started in."""
    try:
        return bool(process.environ().get("TMPDIR") == str(folder) or process.cwd().startswith(str(folder)))
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
