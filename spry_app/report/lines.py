"""Curves in a frame: from points to where they lie in a drawing, with ticks and a table. Writes no markup."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.ticker import MaxNLocator

from spry_app.report.measures import shown

Point = tuple[float, float]

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 34
STYLES = 6
"""Colours in style.py; as many more curves follow in the same colours, dashed otherwise."""
_MOST_POINTS = 300
_MOST_DOTS = 30
_THOUSANDS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Curve:
    """As drawn. style, dash: numbers of its colour and its dashes. path: of an SVG. dots: where, and what is there."""

    name: str
    last: str
    style: int
    dash: int
    path: str
    dots: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Tick:
    at: str
    text: str


@dataclass(frozen=True)
class LineChart:
    """A chart with its numbers. head, rows: of its table."""

    title: str
    x_label: str
    curves: list[Curve]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    width, height = WIDTH, HEIGHT
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM


def line_chart(
    title: str, x_label: str, series: Sequence[tuple[str, Sequence[Point]]], share: bool = False
) -> LineChart | None:
    """None where no series has a point. share: the values are shown in per cent."""
    thin = [(name, _thinned(sorted(points))) for name, points in series if points]
    if not thin:
        return None
    xs = [x for _, points in thin for x, _ in points]
    ys = [y for _, points in thin for _, y in points]
    whole = all(x == int(x) for x in xs)
    x_at, x_ticks = _axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, whole, share=False)
    y_at, y_ticks = _axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, False, share)
    curves = []
    for place, (name, points) in enumerate(thin):
        places = [(f"{x_at(x):.1f}", f"{y_at(y):.1f}") for x, y in points]
        dots = [
            (left, top, f"{name}: {shown(y, share)} at {x_label} {shown(x)}")
            for (left, top), (x, y) in zip(places, points, strict=True)
        ]
        path = "M" + "L".join(f"{left} {top}" for left, top in places)
        few = dots if len(dots) <= _MOST_DOTS else dots[-1:]
        curves.append(Curve(name, shown(points[-1][1], share), place % STYLES, place // STYLES % 3, path, few))
    known = [dict(points) for _, points in thin]
    rows = [[shown(x), *(shown(of.get(x), share) for of in known)] for x in sorted(set(xs))]
    left_out = max(len(points) for _, points in series) > _MOST_POINTS
    note = f"Of each curve {_MOST_POINTS} points or fewer are shown, evenly spread." if left_out else ""
    return LineChart(title, x_label, curves, x_ticks, y_ticks, [x_label, *(name for name, _ in thin)], rows, note)


class _Scale:
    """From a value to a place in the drawing, linearly."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._start, self._per = low, start, (end - start) / (high - low)

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) * self._per


def _axis(low: float, high: float, start: float, end: float, whole: bool, share: bool) -> tuple[_Scale, list[Tick]]:
    if high - low <= 1e-9 * max(abs(high), abs(low), 1e-9):  # one value: a frame around it
        low, high = (low - 1, high + 1) if whole else (low - 0.1 * (abs(low) or 1), high + 0.1 * (abs(high) or 1))
    ticks = list(map(float, MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)))
    if not whole:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    scale = _Scale(low, high, start, end)
    step = min(b - a for a, b in pairwise(ticks))
    inside = [tick for tick in ticks if low - 1e-9 * step <= tick <= high + 1e-9 * step]
    texts = _texts(inside, step, share)
    return scale, [Tick(f"{scale(tick):.1f}", text) for tick, text in zip(inside, texts, strict=True)]


def _texts(ticks: Sequence[float], step: float, share: bool) -> list[str]:
    """With as many digits as tell each from its neighbours."""
    factor, suffix = (100.0, " %") if share else (1.0, "")
    largest = factor * max(map(abs, ticks))
    if largest < 1e-3:
        return [f"{value:.2g}" for value in ticks]
    size, letter = next(((size, letter) for size, letter in _THOUSANDS if largest >= 10 * size), (1.0, ""))
    factor, step = factor / size, step * factor / size
    digits = next(digits for digits in range(12) if abs(round(step, digits) - step) < 1e-6 * step)
    return [f"{factor * value:.{digits}f}{letter}{suffix}" if value else f"0{suffix}" for value in ticks]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most so many of them, the first and the last among these."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(place * last / (_MOST_POINTS - 1))] for place in range(_MOST_POINTS)]
