"""What a table of convergence says of the goals set for the new default: pure readings of curves. Nothing is run."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.cells import Outcome
from benchmarks.contenders import BEST_LORA, NEW, PUBLISHED_ZEROTH, ZEROTH
from benchmarks.curves import Curve, Figure, at, budget, figure, taken
from spry_app.autodiff.memory import MIB

Curves = Mapping[str, Sequence[Curve]]
"""Row -> a curve a seed, in the order of the seeds."""
TWIN_POINTS, LORA_POINTS, MOST_BYTES, LEAST_RATIO = 0.5, 1.5, 1024, 10
"""Issue 5: points below backprop on the same adapter, and below the best LoRA by backprop; bytes a client and round;
times fewer forward passes to the target than the best zeroth-order row.
"""


def curves_of(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, list[Curve]]:
    """Of the rows all of whose seeds came through: differences are those of equal seeds."""
    whole = {name: found for name, found in outcomes.items() if found and not any(one.error for one in found)}
    return {name: [one.curve for one in found] for name, found in whole.items()}


def bytes_up(curves: Sequence[Curve], clients: int) -> float:
    """A client and round, as a mean over the runs."""
    last = [curve[-1] for curve in curves]
    return statistics.fmean(line["mib-up"] * MIB / (line["round"] * clients) for line in last)


def difference(ours: Sequence[Curve], theirs: Sequence[Curve], axis: str = "") -> Figure:
    """In points: our accuracy less theirs, of equal seeds, at what both have spent of the axis, or ("") at the ends."""
    found = []
    for pair in zip(ours, theirs, strict=True):
        most = budget(pair, axis) if axis else math.inf
        mine, other = (at(curve, axis or "rounds", most, "accuracy") for curve in pair)
        found.append(None if mine is None or other is None else 100 * (mine - other))
    return figure(found)


@dataclass(frozen=True)
class Ratio:
    """Forward passes of another row over ours, to the same accuracy; None where ours does not always come there.

    least: the other does not always come there either, and its whole runs count: the ratio is at least this.
    """

    value: float | None
    least: bool = False

    def __str__(self) -> str:
        return "-" if self.value is None else f"{'> ' if self.least else ''}{self.value:.3g}"


def forwards_ratio(ours: Sequence[Curve], theirs: Sequence[Curve], target: float) -> Ratio:
    """Of means over the seeds."""
    (missed, mine), (least, other) = _forwards(ours, target), _forwards(theirs, target)
    return Ratio(None) if missed or not mine else Ratio(other / mine, least)


def _forwards(curves: Sequence[Curve], target: float) -> tuple[bool, float]:
    """Whether a seed does not come to the target; what they take to it as a mean, where those count as a whole."""
    found = [taken(curve, "forwards", target) for curve in curves]
    whole = [float(c[-1]["forwards"]) if value is None else value for value, c in zip(found, curves, strict=True)]
    return None in found, sum(whole) / len(whole)


def most_accurate(curves: Curves, names: Sequence[str]) -> str:
    """Of these rows at their ends, as a mean over seeds; empty where none of them is there."""
    known = [name for name in names if name in curves]
    return max(known, key=lambda name: sum(curve[-1]["accuracy"] for curve in curves[name]), default="")


def fastest(curves: Curves, names: Sequence[str], target: float) -> str:
    """The row of these with the fewest forward passes to the target; where none comes there, the most accurate."""
    there = [name for name in names if name in curves and not _forwards(curves[name], target)[0]]
    return min(there, key=lambda name: _forwards(curves[name], target)[1], default=most_accurate(curves, names))


@dataclass(frozen=True)
class Goal:
    """wanted, came: sentences. reached: None where a row that it needs is not in the table."""

    wanted: str
    came: str
    reached: bool | None

    def __str__(self) -> str:
        verdict = {True: "reached", False: "NOT reached", None: "not known"}[self.reached]
        return f"{self.wanted}: {verdict} ({self.came})"


def goals(curves: Curves, twins: Mapping[str, str], target: float, clients: int) -> list[Goal]:
    """The issue's four, the last of them twice: with and without zeroth-order methods in our own subspace."""
    lora = most_accurate(curves, BEST_LORA)
    return [
        _points(curves, twins.get(NEW, ""), "rounds", TWIN_POINTS, "backprop on the same adapter at equal rounds"),
        _points(curves, lora, "", LORA_POINTS, f"the best LoRA by backprop ({lora or 'none'}) at the end"),
        _bytes(curves, clients),
        _fewer(curves, ZEROTH, target, "any zeroth-order row"),
        _fewer(curves, PUBLISHED_ZEROTH, target, "the zeroth-order methods as published"),
    ]


def _points(curves: Curves, other: str, axis: str, points: float, what: str) -> Goal:
    wanted = f"within {points} points of {what}"
    if not {NEW, other} <= curves.keys():
        return Goal(wanted, "a row is missing", None)
    found = difference(curves[NEW], curves[other], axis)
    return Goal(wanted, f"{told(found)} points", None if found.mean is None else found.mean >= -points)


def _bytes(curves: Curves, clients: int) -> Goal:
    wanted = f"under {MOST_BYTES} bytes up a client and round"
    if NEW not in curves:
        return Goal(wanted, "a row is missing", None)
    sent = bytes_up(curves[NEW], clients)
    head = f", {bytes_up(curves['head only'], clients):.0f} with the head alone" if "head only" in curves else ""
    return Goal(wanted, f"{sent:.0f}{head}", sent < MOST_BYTES)


def _fewer(curves: Curves, names: Sequence[str], target: float, what: str) -> Goal:
    wanted = f"at least {LEAST_RATIO} times fewer forwards to {target:.1%} than {what}"
    other = fastest(curves, names, target)
    if NEW not in curves or not other:
        return Goal(wanted, "a row is missing", None)
    ratio = forwards_ratio(curves[NEW], curves[other], target)
    if ratio.value is None:
        return Goal(wanted, "the new default does not come there with every seed", False)
    # "> 3" may be more than 10: then nobody knows.
    reached = True if ratio.value >= LEAST_RATIO else None if ratio.least else False
    return Goal(wanted, f"{ratio} times, {other}", reached)


def told(value: Figure | Ratio | float | None) -> str:
    """A cell of the table; differences have their sign, and their spread where there is one."""
    match value:
        case Figure(mean=float(mean), spread=spread):
            return f"{mean:+.1f}" + ("" if spread is None else f" ± {spread:.1f}")
        case Ratio():
            return str(value)
        case float():
            return f"{value:.0f}"
    return "-"


HEADS = ("bytes up", "to best zeroth order", "to backprop, same adapter", "to best lora")


def beside(curves: Curves, twins: Mapping[str, str], target: float, clients: int) -> dict[str, dict[str, Any]]:
    """Row -> HEADS: bytes up a client and round; times fewer forwards to the target than the best zeroth-order row;
    points at equal rounds, and at the end.
    """
    zeroth, lora = fastest(curves, ZEROTH, target), most_accurate(curves, BEST_LORA)
    return {
        name: {
            HEADS[0]: bytes_up(found, clients),
            HEADS[1]: forwards_ratio(found, curves[zeroth], target) if zeroth else None,
            HEADS[2]: difference(found, curves[twins[name]], "rounds") if twins.get(name) in curves else None,
            HEADS[3]: difference(found, curves[lora]) if lora else None,
        }
        for name, found in curves.items()
    }


def as_json(rows: Mapping[str, Mapping[str, Any]], found: Sequence[Goal]) -> dict[str, Any]:
    """Both, of plain values."""
    plain = {
        name: {head: asdict(value) if isinstance(value, Ratio | Figure) else value for head, value in row.items()}
        for name, row in rows.items()
    }
    return {"beside each other": plain, "goals": [asdict(goal) for goal in found]}
