"""What is wrong with a file of rows, and in which lines, before anybody trains on it. Nothing here changes a file."""

import csv
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet

from spry_app.config import DataConfig
from spry_app.data.corpus import load_file
from spry_app.data.sources import require_file
from spry_app.errors import SpryError
from spry_app.findings import Finding, Level
from spry_app.tasks import get_task
from spry_app.tasks.columns import named

Rows = Iterator[tuple[int, dict[str, Any] | str]]
"""(number of the line or row, from 1; the row, or why it is none)."""
_LABEL = "label-field"
_MOST = 5
"""Lines that are named."""


def check_file(path: str, config: DataConfig) -> Iterator[tuple[str, Finding]]:
    """(what was looked at, what was found); one line of the file is in memory at a time, and a hash of each.

    Raises SpryError for a file that is absent or of no kind that is read.
    """
    file = require_file(path, "the file")
    found, trained = _by_line(file, config), _training(file, config)
    yield from found.findings("note" if trained.level == "ok" else "problem")
    yield "training", trained


def _training(file: Path, config: DataConfig) -> Finding:
    try:
        rows = load_file(config, str(file))
    except SpryError as error:
        return Finding("problem", str(error))
    return Finding("ok", f"{len(rows)} rows can be trained on as data.task {config.task!r}.")


@dataclass
class _Portrait:
    """What a pass over the lines leaves. fields: what is read of a row, without the label. label: "" for none."""

    fields: tuple[str, ...]
    label: str
    noun: str
    rows: int = 0
    broken: list[tuple[int, str]] = field(default_factory=list)
    missing: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    empty: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    words: list[int] = field(default_factory=list)
    labels: Counter[Hashable] = field(default_factory=Counter)
    again: list[int] = field(default_factory=list)
    torn: list[int] = field(default_factory=list)
    _seen: dict[int, str] = field(default_factory=dict)

    def take(self, number: int, row: dict[str, Any]) -> None:
        self.rows += 1
        for name in (*self.fields, *filter(None, [self.label])):
            if row.get(name) is None:
                self.missing[name].append(number)
            elif not str(row[name]).strip():
                self.empty[name].append(number)
        said = tuple(json.dumps(row.get(name), sort_keys=True, default=str) for name in self.fields)
        label = str(row.get(self.label))
        if self.label:
            self.labels[label] += 1
        self.words.append(sum(_words(row.get(name)) for name in self.fields))
        if (key := hash(said)) not in self._seen:
            self._seen[key] = label
        else:
            (self.again if self._seen[key] == label else self.torn).append(number)

    def findings(self, gaps: Level) -> Iterator[tuple[str, Finding]]:
        """gaps: how bad it is that a row lacks what another has."""
        for number, why in self.broken[:_MOST]:
            yield "rows", Finding("problem", f"{self.noun} {number} is no row: {why}.", {"number": number})
        yield "rows", Finding("ok" if self.rows else "problem", f"{self.rows} rows.", {"rows": self.rows})
        for name, numbers in self.missing.items():
            yield name, self._told(gaps, "missing", numbers)
        for name, numbers in self.empty.items():
            yield name, self._told("note", "empty", numbers)
        if self.labels:
            told = ", ".join(f"{name} {count}" for name, count in self.labels.most_common(20))
            more = f" and {len(self.labels) - 20} more" if len(self.labels) > 20 else ""
            yield "labels", Finding("ok", f"{len(self.labels)}: {told}{more}.", {"labels": len(self.labels)})
        if self.words:
            median, most = statistics.median(self.words), max(self.words)
            yield "length", Finding("ok", f"{median:g} words (median), {most} at most.", {"words-at-most": most})
        if self.again:
            yield "duplicates", self._told("note", "said before", self.again)
        if self.torn:
            yield "contradictions", self._told("note", "said before with another label", self.torn)

    def _told(self, level: Level, what: str, numbers: Sequence[int]) -> Finding:
        some = ", ".join(map(str, numbers[:_MOST]))
        more = f" … ({len(numbers)} in all)" if len(numbers) > _MOST else ""
        noun = self.noun if len(numbers) == 1 else f"{self.noun}s"
        return Finding(level, f"{what} in {noun} {some}{more}.", {"count": len(numbers), "first": numbers[0]})


def _by_line(file: Path, config: DataConfig) -> _Portrait:
    noun, rows = _READERS[file.suffix.lower()]
    held = (name for _, row in rows(file) if isinstance(row, dict) for name, value in _flat(row) if value is not None)
    found = _Portrait(*_columns(config, list(dict.fromkeys(held))), noun)
    for number, row in rows(file):
        if isinstance(row, str):
            found.broken.append((number, row))
        else:
            found.take(number, dict(_flat(row)))
    return found


def _columns(config: DataConfig, held: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """What to look at of the columns that a file has: those that the config names, or else all; and the label, or "".
    A column that no row has is left to whoever trains on them: it may not be needed.
    """
    keys = get_task(config).keys
    fields = {key: str(getattr(config, key.replace("-", "_"))) for key in sorted(keys) if key.endswith("-field")}
    label = fields.pop(_LABEL, "")
    wanted = [name for field in fields.values() if field for name in named(field)]
    read = [column for column in held if any(column == name or column.startswith(f"{name}.") for name in wanted)]
    return tuple(read or (column for column in held if column != label)), label if label in held else ""


def _flat(row: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Columns within columns by their path ("idx.question"), as they are trained on."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _words(value: Any) -> int:
    """In all texts of a column's value, which may be a list of messages."""
    if isinstance(value, str):
        return len(value.split())
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_words, parts))


def _json(file: Path) -> Rows:
    with file.open(encoding="utf-8") as lines:
        if lines.read(1) == "[":  # one array, as some programs write it
            lines.seek(0)
            yield from enumerate(json.load(lines), 1)
            return
        lines.seek(0)
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    row = str(error)
                yield number, row if isinstance(row, dict | str) else f"it holds {type(row).__name__}, not an object"


def _csv(file: Path) -> Rows:
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines, restkey="", restval=None)
        for row in reader:
            more = row.pop("", None)
            found = {name: value or None for name, value in row.items()}
            yield reader.line_num, f"it has {len(more)} cells more than the first line" if more else found


def _parquet(file: Path) -> Rows:
    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield number, row


_READERS: dict[str, tuple[str, Callable[[Path], Rows]]] = {
    ".jsonl": ("line", _json),
    ".json": ("line", _json),
    ".csv": ("line", _csv),
    ".parquet": ("row", _parquet),
}
"""Ending -> what a row is called by its number, and how rows are read one by one."""
