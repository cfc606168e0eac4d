"""Processes that do the same thing at the same time."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def at_once(command: Sequence[str], count: int = 3, timeout_s: float = 900.0) -> list[str]:
    """What each prints. They read a line before they begin, which comes when all have been started."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(count)]
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate(timeout=timeout_s)[0] for process in processes]
