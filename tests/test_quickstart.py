"""docs/quickstart.md: its files and its commands in an empty folder, in their order, and what they print."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
from pages import DOCS, ROOT, session, write_files

PAGE = DOCS / "quickstart.md"
STEPS = session(PAGE)
LOOKS = [command.startswith("spry run") for command, _ in STEPS].index(True)
"""How many commands come before anything is trained."""


def done(command: str, folder: Path) -> list[str]:
    """What it prints. `spry` and `python` are this checkout's; a run takes its app from there, not from `folder`."""
    (run,) = [path.name for path in folder.glob("outputs/*")] or [""]
    words = shlex.split(command.replace("<run id>", run))
    program = {"spry": [sys.executable, "-m", "spry_app.cli"], "python": [sys.executable]}[words[0]]
    app = [str(ROOT)] if words[:2] == ["spry", "run"] else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        [*program, *words[1:], *app], cwd=folder, env=environment, stdout=PIPE, stderr=PIPE, text=True
    ) as started:
        try:
            printed, errors = started.communicate(timeout=1500)
        except subprocess.TimeoutExpired:
            started.terminate()  # not killed: it ends what it has started
            raise
    assert started.returncode == 0, printed + errors
    return printed.splitlines()


def shape(lines: list[str]) -> list[str]:
    """Without what differs from machine to machine: numbers, how they are padded, and the time that is left."""
    return [re.sub(r"[\d.:]+", "#", re.sub(r"\s+\d+:\d\d left", "", line)).strip().replace("  ", " ") for line in lines]


def test_before_training_the_page_says_what_is_printed_to_the_letter(tmp_path: Path) -> None:
    write_files(PAGE, tmp_path)
    for command, shown in STEPS[:LOOKS]:
        assert [line.rstrip() for line in done(command, tmp_path)] == shown, command


@pytest.mark.slow
def test_from_rows_to_a_pipeline(tmp_path: Path) -> None:
    write_files(PAGE, tmp_path)
    for command, shown in STEPS:
        printed = done(command, tmp_path)
        assert shape(printed) == shape(shown), command
        if command.startswith("spry run"):
            (after,) = re.findall(r"before, ([\d.]+)% after", "\n".join(printed))
            assert float(after) > 80
