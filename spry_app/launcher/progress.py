"""What the person who started a run sees of it: each round as it ends, and the summary. Judges nothing."""

import os
import re
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

Row = dict[str, Any]
_SCORED = re.compile(r"Scored [\d,]+ of [\d,]+ rows$")
"""What the server says while it scores a model for long."""


class RoundDisplay:
    """A live line in a terminal; one plain line a round anywhere else: in files, CI logs, notebooks, dumb terminals."""

    def __init__(self, console: Console, nodes: int) -> None:
        self._console = console
        # Rich takes a file for a terminal where FORCE_COLOR is set, as in many a CI. A shell line of a notebook gets a
        # real one, whose cursor the page does not follow.
        self._is_live = console.is_interactive and console.file.isatty() and "JPY_PARENT_PID" not in os.environ
        self._waiting = f"Starting {nodes} devices"
        self._first: Row | None = None
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20 if console.width >= 100 else 10),
            TextColumn("{task.fields[rest]}"),
        )
        self._live = Progress(*columns, console=console, transient=True, disable=not self._is_live)
        self._task = self._live.add_task(self._waiting, total=None, rest="")

    def show(self, row: Row) -> None:
        """One line of metrics.jsonl."""
        if row["round"] >= 1:  # Ray starts and models load before the first round ends: no measure of the pace
            self._first = self._first or row
        head, rest = f"Round {row['round']}/{row['rounds']}", describe(row, self._first)
        if self._is_live:
            self._live.update(self._task, description=head, completed=row["round"], total=row["rounds"], rest=rest)
        else:
            self._console.print(f"{head}  {rest}", soft_wrap=True, highlight=False)

    def note(self, line: str) -> None:
        """One line of the run's log, of which there is more to see than of a round that takes long."""
        found = _SCORED.search(line)
        if found and self._is_live:
            self._live.update(self._task, rest=found[0])
        elif found:
            self._console.print(found[0], soft_wrap=True, highlight=False)

    def __enter__(self) -> Self:
        if not self._is_live:
            self._console.print(self._waiting, soft_wrap=True, highlight=False)
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


def describe(row: Row, first: Row | None) -> str:
    """Loss, main metric, MiB sent both ways, time left; `first`: the round from which the pace is measured."""
    parts = []
    loss = row["loss"] if row["loss"] is not None else row["train-loss"]
    if loss is not None:
        parts.append(f"loss {loss:.3f}")
    name = row.get("main-metric", "accuracy")
    main = (row.get("metrics") or row).get(name)
    if main is not None:
        parts.append(f"{name} {main:.1%}")
    if row.get("epsilon") is not None:
        parts.append(f"epsilon {row['epsilon']:.3g}")
    if row["answered"] < row["asked"]:
        parts.append(f"{row['answered']} of {row['asked']} devices answered")
    if row["refused"]:
        parts.append(f"{row['refused']} refused")
    if row.get("late"):
        parts.append(f"{len(row['late'])} late")
    if row.get("partial"):
        parts.append(f"{row['partial']} partial ({row['steps']} of {row['steps-asked']} steps)")
    parts.append(f"sent {row['mib-up'] + row['mib-down']:.2f} MiB")
    left = row["rounds"] - row["round"]
    if first is not None and left and row["round"] > first["round"]:
        pace_s = (row["seconds"] - first["seconds"]) / (row["round"] - first["round"])
        parts.append(f"{clock(pace_s * left)} left")
    return "  ".join(parts)


def summary(result: Row, base: Path) -> Table:
    """The closing table from result.json; paths are shown relative to `base` where they are below it."""
    table = Table.grid(padding=(0, 2))
    name = result.get("main-metric", "accuracy")
    table.add_row(
        name, f"{_percent(result.get(f'{name}-before'))} before, {_percent(result.get(f'{name}-after'))} after"
    )
    table.add_row(
        "memory", f"{_mib(result['peak-mib'])} a client step; {_mib(result['peak-mib-backprop'])} with backprop"
    )
    table.add_row("time", f"{clock(result['seconds'])} for {result['rounds']} rounds")
    if result.get("stopped"):
        table.add_row("ended", result["stopped"])
    for name in ("adapter", "metrics", "report"):
        if result.get(name):
            path = Path(result[name])
            table.add_row(name, str(path.relative_to(base) if path.is_relative_to(base) else path))
    return table


def clock(seconds: float) -> str:
    """Minutes and seconds, 1:05."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}"


def _mib(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f} MiB"
