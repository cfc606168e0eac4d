"""What runs beside each other came to: the table over seeds, the picture. Readings are curves.py's; nothing is run."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import Outcome
from benchmarks.curves import AXES, Curve, Figure, at, axes, budget, figure, points, taken
from benchmarks.search import Search

QUANTITIES = {"generalised": "accuracy", "personalised": "personalised-accuracy"}


@dataclass(frozen=True)
class Summary:
    """at: axis -> budget. accuracy: variant -> "generalised at equal rounds" and the like. to_target: variant -> what
    was taken of each axis. costs: variant -> of a whole run. curves: variant -> quantity -> means over seeds.
    """

    question: str
    at: Mapping[str, float]
    target: float
    accuracy: Mapping[str, Mapping[str, Figure]]
    to_target: Mapping[str, Mapping[str, Figure]]
    costs: Mapping[str, Mapping[str, float]]
    curves: Mapping[str, list[dict[str, float | None]]]
    errors: Mapping[str, list[str]]
    commits: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(question: str, outcomes: Mapping[str, Sequence[Outcome]], target: float, forwards: float) -> Summary:
    """target: accuracy, 0 for half of the best variant's gain. forwards: the budget, 0 for what all have spent."""
    curves = {name: [one.curve for one in found if not one.error] for name, found in outcomes.items()}
    curves = {name: found for name, found in curves.items() if found}
    every = [curve for found in curves.values() for curve in found]
    budgets = {axis: budget(every, axis) for axis in axes(every)} if every else {}
    if forwards and every:
        budgets["forwards"] = forwards
    target = target or _half_way(curves)
    return Summary(
        question=question,
        at=budgets,
        target=target,
        accuracy={name: _accuracies(found, budgets) for name, found in curves.items()},
        to_target={
            name: {axis: figure([taken(curve, axis, target) for curve in found]) for axis in budgets}
            for name, found in curves.items()
        },
        costs={
            name: _costs([one for one in found if not one.error]) for name, found in outcomes.items() if name in curves
        },
        curves={name: mean_curve(found) for name, found in curves.items()},
        errors={
            name: errors for name, found in outcomes.items() if (errors := [one.error for one in found if one.error])
        },
        commits=sorted({one.commit for found in outcomes.values() for one in found}),
    )


def _accuracies(curves: Sequence[Curve], budgets: Mapping[str, float]) -> dict[str, Figure]:
    ends = {
        f"{told} at the end": figure([at(curve, "rounds", math.inf, quantity) for curve in curves])
        for told, quantity in QUANTITIES.items()
    }
    return ends | {
        f"{told} at equal {axis}": figure([at(curve, axis, most, quantity) for curve in curves])
        for told, quantity in QUANTITIES.items()
        for axis, most in budgets.items()
    }


def _half_way(curves: Mapping[str, Sequence[Curve]]) -> float:
    """Between the accuracy before training and the best variant's after it."""
    ends = {name: figure([curve[-1]["accuracy"] for curve in found]).mean or 0.0 for name, found in curves.items()}
    starts = [float(curve[0]["accuracy"]) for found in curves.values() for curve in found]
    return round((sum(starts) / len(starts) + max(ends.values())) / 2, 3) if ends else 0.0


def _costs(outcomes: Sequence[Outcome]) -> dict[str, float]:
    last: dict[str, Callable[[Outcome], float]] = {
        "rounds": lambda one: one.last["round"],
        "forwards": lambda one: one.last["forwards"],
        "MiB up": lambda one: one.last["mib-up"],
        "MiB down": lambda one: one.last["mib-down"],
        "peak MiB of a step": lambda one: max(line["peak-mib"] or 0.0 for line in one.curve),
        "seconds": lambda one: one.seconds,
    }
    return {name: sum(map(value, outcomes)) / len(outcomes) for name, value in last.items()}


def mean_curve(curves: Sequence[Curve]) -> list[dict[str, float | None]]:
    """Means over seeds of the evaluated rounds; the seeds were evaluated at the same ones."""
    spent = dict.fromkeys(part for axis in axes(curves) for part in AXES[axis])
    names = (*spent, *QUANTITIES.values(), "loss")
    lines = zip(*([line for line in curve if line["accuracy"] is not None] for curve in curves), strict=True)
    return [{name: figure([line[name] for line in each]).mean for name in names} for each in lines]


def print_summary(summary: Summary, searches: Sequence[Search]) -> None:
    """Tables as Markdown has them."""
    print(summary.question)
    budgets = ", ".join(f"{most:.4g} {axis}" for axis, most in summary.at.items())
    for told in QUANTITIES:
        heads = [f"{told} at the end", *(f"{told} at equal {axis}" for axis in summary.at)]
        if all(figures[heads[0]].mean is None for figures in summary.accuracy.values()):
            continue
        rows = [(name, *(_percent(figures[head]) for head in heads)) for name, figures in summary.accuracy.items()]
        print_table(f"Accuracy, {told}, % (at {budgets})", ("", "end", *(f"equal {axis}" for axis in summary.at)), rows)
    rows = [(name, *(_mean(figures[axis]) for axis in summary.at)) for name, figures in summary.to_target.items()]
    print_table(f"To an accuracy of {summary.target:.1%}", ("", *summary.at), rows)
    heads = list(next(iter(summary.costs.values()), {}))
    rows = [(name, *(f"{cost[head]:.4g}" for head in heads)) for name, cost in summary.costs.items()]
    print_table("A whole run", ("", *heads), rows)
    heads = ["", "key", "chosen", "loss at each value tried"]
    title = "Step sizes, by the mean loss of a short run on rows of the training file"
    print_table(title, heads, [_searched(one) for one in searches])
    for name, errors in summary.errors.items():
        print(f"{name} failed: {errors[0]}")


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}\n")
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def _searched(one: Search) -> tuple[str, ...]:
    told = one.record()
    tried = ", ".join(
        f"{each['value']:g}: " + ("failed" if "error" in each else f"{each['loss']:.3f}") for each in told["tried"]
    )
    return told["for"], told["key"], f"{told['chosen']:g}", tried


def _percent(figure: Figure) -> str:
    if figure.mean is None:
        return "-"
    return f"{figure.mean:.1%}".rstrip("%") + (f" ± {100 * figure.spread:.1f}" if figure.spread is not None else "")


def _mean(figure: Figure) -> str:
    if figure.mean is None:
        return "not reached"
    return f"{figure.mean:.3g}" + (f" ({figure.count} of {figure.seeds})" if figure.count < figure.seeds else "")


def draw(summary: Summary, path: Path) -> None:
    """Accuracy over rounds, forwards and MiB: means over seeds."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure as Picture

    spent = list(summary.at) or list(AXES)
    picture = Picture(figsize=(13, 4.2), layout="constrained")
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for plot, axis in zip(picture.subplots(1, len(spent)), spent, strict=True):
        for place, (name, curve) in enumerate(summary.curves.items()):
            known = points(curve, axis, "accuracy")
            plot.plot(*zip(*known, strict=True), label=name, color=colours[place % len(colours)], marker=".")
        plot.set(xlabel={"forwards": "forward passes of one example"}.get(axis, axis), ylabel="accuracy")
        plot.grid(alpha=0.3)
    handles, labels = picture.axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside right center", frameon=False)
    picture.savefig(path, dpi=120)
