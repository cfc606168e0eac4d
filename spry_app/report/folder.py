"""What a run left in its folder, read: finished, still going, or cut short. Nothing is drawn or judged here."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spry_app.errors import SpryError

Row = dict[str, Any]
_NESTED = {"metrics": "", "personalised": "personalised-"}
"""What a line of metrics.jsonl has of its task's metrics -> what comes before their names."""


@dataclass(frozen=True)
class Run:
    """A run's files as values; what a file would have told is empty where there is none.

    rounds: lines of metrics.jsonl, the task's metrics among the rest ("f1", "personalised-f1"), and "mib" for both ways
    together. about: run.json. choice: gradient.json. assignments: lines of assignments.jsonl. result: result.json of a
    run that has completed the last of `rounds`.
    """

    name: str
    rounds: list[Row]
    config: Row = field(default_factory=dict)
    about: Row = field(default_factory=dict)
    choice: Row = field(default_factory=dict)
    assignments: list[Row] = field(default_factory=list)
    result: Row = field(default_factory=dict)

    def curve(self, name: str, over: str = "round") -> list[tuple[float, float]]:
        """What was measured by this name, over another."""
        points = ((number(line.get(over)), number(line.get(name))) for line in self.rounds)
        return [(x, y) for x, y in points if x is not None and y is not None]

    def last(self, name: str) -> float | None:
        """The latest value by this name."""
        return next((value for line in reversed(self.rounds) if (value := number(line.get(name))) is not None), None)

    def peak_mib(self) -> float | None:
        """Of a client's step: as measured at the end, else the highest of the rounds."""
        measured = number(self.result.get("peak-mib"))
        return measured or max((mib for _, mib in self.curve("peak-mib")), default=None)


def read_run(folder: Path) -> Run:
    """Raises SpryError where `folder` is not one of a run, or a file in it cannot be read."""
    if not folder.is_dir():
        raise SpryError(f"{folder} is not a folder; give one of a run, such as outputs/<run id>.")
    if not any((folder / name).exists() for name in ("metrics.jsonl", "config.json")):
        inside = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
        hint = f" There are runs in it: {', '.join(inside[:4])}." if inside else ""
        raise SpryError(f"{folder} is not the folder of a run: it has neither metrics.jsonl nor config.json.{hint}")
    rounds = [{**_flat(line), "mib": _both_ways(line)} for line in _lines(folder / "metrics.jsonl")]
    result = _object(folder / "result.json")
    done = bool(rounds) and result.get("rounds") == rounds[-1].get("round")
    return Run(
        name=folder.resolve().name,
        rounds=rounds,
        config=_object(folder / "config.json"),
        about=_object(folder / "run.json"),
        choice=_object(folder / "gradient.json"),
        assignments=_lines(folder / "assignments.jsonl"),
        result=result if done else {},
    )


def number(value: object) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _flat(line: Row) -> Row:
    """What the line itself has by a name stays."""
    found = dict(line)
    for key, before in _NESTED.items():
        named = line.get(key)
        for name, value in named.items() if isinstance(named, dict) else ():
            found.setdefault(before + name, value)
    return found


def _both_ways(line: Row) -> float:
    return sum(number(line.get(name)) or 0.0 for name in ("mib-up", "mib-down"))


def _object(path: Path) -> Row:
    try:
        found = json.loads(path.read_text(errors="replace")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise SpryError(f"{path} cannot be read ({error}).") from None
    if not isinstance(found, dict):
        raise SpryError(f"{path} holds no JSON object.")
    return found


def _lines(path: Path) -> list[Row]:
    """Objects, a line each; what follows the last end of line is still being written, or was cut short."""
    if not path.exists():
        return []
    found = []
    for place, line in enumerate(path.read_text(errors="replace").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SpryError(f"{path}, line {place} cannot be read ({error}).") from None
        if not isinstance(row, dict):
            raise SpryError(f"{path}, line {place} holds no JSON object.")
        found.append(row)
    return found
