"""Counts in rows and columns as a grid of shaded cells: from numbers to places in a drawing. Writes no markup."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from math import ceil

from spry_app.report.measures import shown

WIDTH, TOP = 360, 18
LEVELS = 5
"""Shades in style.py, beside that of an empty cell."""
_LETTER = 6.0
"""Width of one at the size of a label; one in a cell has three quarters of it."""
_LONGEST_LABEL = 18
_MOST_ROWS, _MOST_TIPS = 150, 1500
_LABEL_EVERY = 11.0
_DARK = 4
"""The first level on which text needs the colour of the page."""


@dataclass(frozen=True)
class Cell:
    """What is in it: how much, in words for a tip, and a short text that is drawn where there is room."""

    value: float | None = None
    tip: str = ""
    text: str = ""


@dataclass(frozen=True)
class Label:
    at: str
    text: str


@dataclass(frozen=True)
class Tip:
    x: float
    y: float
    tip: str
    text: str
    dark: bool


@dataclass(frozen=True)
class Shade:
    """Cells of one level, as one path of an SVG; `means` says which values those are."""

    level: int
    means: str
    path: str


@dataclass(frozen=True)
class Frame:
    """Where cells lie: from `left` and TOP, each `width` by `height`, down to `bottom`; labels below are slanted where
    there is no room for them otherwise; the whole drawing is `below` high.
    """

    left: float
    width: float
    height: float
    bottom: float
    slanted: bool
    below: float


@dataclass(frozen=True)
class Grid:
    """A grid with its numbers. what: that is counted. corner: what a row is. head, rows: of its table."""

    title: str
    x_label: str
    what: str
    corner: str
    shades: list[Shade]
    row_labels: list[Label]
    column_labels: list[Label]
    tips: list[Tip]
    frame: Frame
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    whole_width = WIDTH


def grid(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[Cell]],
    *,
    x_label: str,
    what: str,
    corner: str,
    table: tuple[list[str], list[list[str]]],
) -> Grid | None:
    """cells: by rows. None where there is no cell."""
    if not rows or not columns:
        return None
    note = f"The first {_MOST_ROWS} of {len(rows)} rows are drawn." if len(rows) > _MOST_ROWS else ""
    names, below, cells = shortened(rows)[:_MOST_ROWS], [_cut(name) for name in columns], cells[:_MOST_ROWS]
    frame = _frame([corner, *names], len(names), below)
    room = _LABEL_EVERY if frame.slanted else _LETTER * max(map(len, below)) + 6
    edges = _edges(sorted({cell.value for line in cells for cell in line if cell.value}))
    return Grid(
        title=title,
        x_label=x_label,
        what=what,
        corner=corner,
        shades=_shades(cells, frame, edges),
        row_labels=_labels(names, TOP + frame.height / 2 + 3.5, frame.height, _LABEL_EVERY),
        column_labels=_labels(below, frame.left + frame.width / 2, frame.width, room),
        tips=_tips(cells, frame, edges),
        frame=frame,
        head=table[0],
        rows=table[1],
        note=note,
    )


def _frame(names: Sequence[str], rows: int, columns: Sequence[str]) -> Frame:
    longest = max(map(len, columns))
    left = 8 + _LETTER * max(map(len, names))
    width = (WIDTH - left - 6) / len(columns)
    slanted = longest * _LETTER > 0.95 * width and not all(name.isdigit() for name in columns)
    if slanted:  # the first label begins far to the left of its cell
        left = max(left, 0.62 * _LETTER * longest)
    height = min(18.0, max(2.5, 320 / rows), max(width, 9.0))
    width = min((WIDTH - left - 6) / len(columns), max(4 * height, 28.0))
    bottom = TOP + height * rows
    return Frame(left, width, height, bottom, slanted, bottom + (26 + 0.8 * _LETTER * longest if slanted else 32))


def shortened(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts that all of several parts share, and cut to the length of a label."""
    parts = [name.split(".") for name in names]
    common = set.intersection(*(set(p) for p in parts if len(p) > 1)) if any(len(p) > 1 for p in parts) else set()
    return [_cut(".".join(part for part in p if len(p) == 1 or part not in common) or p[-1]) for p in parts]


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"


def _labels(names: Sequence[str], start: float, step: float, room: float) -> list[Label]:
    """Those for which there is room."""
    every = max(1, ceil(room / step - 1e-6))
    return [Label(f"{start + place * step:.1f}", name) for place, name in enumerate(names) if place % every == 0]


def _tips(cells: Sequence[Sequence[Cell]], frame: Frame, edges: Sequence[float]) -> list[Tip]:
    """None where there are too many cells to point at one."""
    if sum(map(len, cells)) > _MOST_TIPS:
        return []
    return [
        Tip(
            x=round(frame.left + column * frame.width, 1),
            y=round(TOP + row * frame.height, 1),
            tip=cell.tip,
            text=cell.text if frame.height >= 9 and 0.75 * _LETTER * len(cell.text) < frame.width else "",
            dark=_level(cell.value or 0.0, edges) >= _DARK,
        )
        for row, line in enumerate(cells)
        for column, cell in enumerate(line)
        if cell.tip
    ]


def _shades(cells: Sequence[Sequence[Cell]], frame: Frame, edges: Sequence[float]) -> list[Shade]:
    paths: dict[int, list[str]] = {}
    inside: dict[int, set[float]] = {}
    right, below = (round(size - (0.8 if size > 5 else 0), 2) for size in (frame.width, frame.height))
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            if cell.value is not None:
                level = _level(cell.value, edges)
                place = f"M{frame.left + column * frame.width:.1f} {TOP + row * frame.height:.1f}"
                paths.setdefault(level, []).append(f"{place}h{right}v{below}h-{right}z")
                inside.setdefault(level, set()).add(cell.value)
    return [Shade(level, _means(inside[level]), "".join(paths[level])) for level in sorted(paths)]


def _edges(values: Sequence[float]) -> list[float]:
    """Highest values of all levels but the last: each value its own, or bands of one width. values: sorted, above 0."""
    if len(values) <= LEVELS:
        return list(values[:-1])
    low, high = values[0], values[-1]
    return [low + (high - low) * level / LEVELS for level in range(1, LEVELS)]


def _level(value: float, edges: Sequence[float]) -> int:
    """0 for nothing; few levels are spread over all shades."""
    if not value:
        return 0
    place = sum(value > edge for edge in edges)
    return round(1 + place * (LEVELS - 1) / len(edges)) if edges else (LEVELS + 1) // 2


def _means(values: Set[float]) -> str:
    return " to ".join(dict.fromkeys((shown(min(values)), shown(max(values)))))
