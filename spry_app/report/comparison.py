"""Several runs side by side as a page: what each gave and cost, their curves in one frame, where their keys differ."""

from collections.abc import Sequence

from spry_app.errors import SpryError
from spry_app.report.folder import Run, number
from spry_app.report.lines import LineChart, line_chart
from spry_app.report.measures import best, heading, is_share, lower_is_better, main_quality, panels, reaches, shown
from spry_app.report.page import COSTS, Page, Section, Table, clock, setting, state_of

_OVER = (("round", "round"), *COSTS)
_WAY = ["run", "round", "forward passes", "MiB both ways", "time"]


def comparison_of(runs: Sequence[Run], target: float | None = None) -> Page:
    """target: of the main quality, to which the way is measured; by default the best value that every run reaches.

    Raises SpryError where the runs have no quality in common.
    """
    name = main_quality(runs)
    missing = [run.name for run in runs if not run.curve(name)]
    if missing and len(missing) == len(runs):
        raise SpryError("None of these runs has evaluated or trained a round yet, so there is nothing to compare.")
    values = [value for run in runs for _, value in run.curve(name)]
    share = is_share(name, values)
    reached = [best(name, [value for _, value in run.curve(name)]) for run in runs if run.curve(name)]
    if target is None:
        target = max(reached) if lower_is_better(name) else min(reached)
    names = [f"{place} {run.name}" for place, run in enumerate(runs, start=1)]
    costs = ["rounds", "forward passes", "MiB both ways", "time", "MiB a step", "epsilon"]
    head = ["run", "method", f"last {name}", f"best {name}", *costs]
    rows = [[title, *_row(run, name, share)] for title, run in zip(names, runs, strict=True)]
    ways = [[title, *_way(run, name, target)] for title, run in zip(names, runs, strict=True)]
    charts = [_overlay(runs, names, name, over, text) for over, text in _OVER]
    others = [_overlay(runs, names, other, "round", "round") for other in _others(runs, name)]
    return Page(
        title=f"{len(runs)} runs side by side",
        subtitle=f"by {name}",
        state=", ".join(f"{place} {state_of(run)[0]}" for place, run in enumerate(runs, start=1)),
        alerts=[f"{title} has no {name}." for title, run in zip(names, runs, strict=True) if not run.curve(name)],
        figures=[],
        sections=[
            Section("What each gave and cost", table=(head, rows)),
            Section(f"What it took until an evaluation reached {shown(target, share)}", table=(_WAY, ways)),
            Section(f"{name.capitalize()} at equal rounds and costs", [chart for chart in charts if chart]),
            Section("Other curves", [chart for chart in others if chart]),
            _differences(runs, names),
        ],
    )


def _row(run: Run, name: str, share: bool) -> list[str]:
    values = [value for _, value in run.curve(name)]
    last, top = (shown(values[-1], share), shown(best(name, values), share)) if values else ("-", "-")
    costs = [shown(run.last(key)) for key in ("round", "forwards", "mib")]
    told = [clock(run.last("seconds") or 0.0), shown(run.peak_mib()), shown(run.last("epsilon"))]
    return [str(run.config.get("method", "-")), last, top, *costs, *told]


def _way(run: Run, name: str, target: float) -> list[str]:
    """What the first line that reached the target had cost."""
    for line in run.rounds:
        value = number(line.get(name))
        if value is not None and reaches(name, value, target):
            costs = [shown(line.get(key)) for key in ("round", "forwards", "mib")]
            return [*costs, clock(number(line.get("seconds")) or 0.0)]
    return ["not reached", "-", "-", "-"]


def _overlay(runs: Sequence[Run], names: Sequence[str], name: str, over: str, text: str) -> LineChart | None:
    series = [(title, run.curve(name, over)) for title, run in zip(names, runs, strict=True)]
    share = is_share(name, [value for _, points in series for _, value in points])
    return line_chart(f"{heading(name)} by {text}", text, series, share)


def _others(runs: Sequence[Run], name: str) -> list[str]:
    found = dict.fromkeys(other for run in runs for group in panels(run.rounds).values() for other in group)
    return [other for other in found if other != name]


def _differences(runs: Sequence[Run], names: Sequence[str]) -> Section:
    """Keys whose values are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    absent = object()
    different = [key for key in keys if len({repr(run.config.get(key, absent)) for run in runs}) > 1]
    if not different:
        return Section("Where their configurations differ", sentences=["Nowhere."])
    table: Table = (["key", *names], [[key, *(setting(run.config.get(key)) for run in runs)] for key in different])
    return Section("Where their configurations differ", table=table)
