"""What curves say at a budget, and what they took to a target: pure readings of numbers. Nothing is run here."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Curve = Sequence[Mapping[str, Any]]
"""Lines of a run's rounds (cells.KEPT); some of them were evaluated."""
AXES: dict[str, tuple[str, ...]] = {
    "rounds": ("round",),
    "forwards": ("forwards",),
    "MiB": ("mib-up", "mib-down"),
    "simulated s": ("simulated-s",),
}
"""What a run spends -> the numbers of a line that add up to it. Forwards: passes of one example (autodiff.costs).
Simulated: where nodes say how fast they are (watched.py).
"""


def axes(curves: Sequence[Curve]) -> list[str]:
    """Of which all of these runs say what they spent."""
    return [name for name, parts in AXES.items() if all({*parts} <= line.keys() for curve in curves for line in curve)]


def spent(line: Mapping[str, Any], axis: str) -> float:
    """On this axis, from the start to this line."""
    return float(sum(line[name] for name in AXES[axis]))


def points(curve: Curve, axis: str, quantity: str) -> list[tuple[float, float]]:
    """(spent, value) wherever the quantity was measured."""
    return [(spent(line, axis), float(line[quantity])) for line in curve if line[quantity] is not None]


def budget(curves: Sequence[Curve], axis: str) -> float:
    """The most that all of them spent."""
    return min(spent(curve[-1], axis) for curve in curves)


def at(curve: Curve, axis: str, budget: float, quantity: str) -> float | None:
    """The quantity when `budget` is spent: on the line between the measured points beside it, never beyond the last.

    None where nothing was measured up to there.
    """
    known = points(curve, axis, quantity)
    before = [point for point in known if point[0] <= budget]
    if not before:
        return None
    (x0, y0), after = before[-1], known[len(before) : len(before) + 1]
    return y0 + (after[0][1] - y0) * (budget - x0) / (after[0][0] - x0) if after else y0


def taken(curve: Curve, axis: str, target: float, quantity: str = "accuracy") -> float | None:
    """What was spent when the quantity first reached the target (between points: on the line); None if it did not."""
    known = points(curve, axis, quantity)
    for place, (x, y) in enumerate(known):
        if y >= target:
            if not place:
                return x
            x0, y0 = known[place - 1]
            return x0 + (x - x0) * (target - y0) / (y - y0)
    return None


@dataclass(frozen=True)
class Figure:
    """Over seeds: mean, spread (standard deviation, of n - 1; None for one), and how many of how many."""

    mean: float | None
    spread: float | None
    count: int
    seeds: int


def figure(values: Sequence[float | None]) -> Figure:
    """Of the seeds that have a value."""
    known = [value for value in values if value is not None]
    return Figure(
        statistics.fmean(known) if known else None,
        statistics.stdev(known) if len(known) > 1 else None,
        len(known),
        len(values),
    )
