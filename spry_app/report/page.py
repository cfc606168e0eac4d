"""One run as a page: which charts, tables and sentences it has. How they look is in templates.py and style.py."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from spry_app.config import RunConfig
from spry_app.report.clients import (
    LABELS_UNKNOWN,
    NOT_KEPT,
    PRIVATE,
    Crew,
    clients_grid,
    failures,
    labels_grid,
    node_table,
    units_grid,
    work_table,
)
from spry_app.report.folder import Run, number
from spry_app.report.grid import Grid
from spry_app.report.lines import LineChart, line_chart
from spry_app.report.measures import best, is_share, label, lower_is_better, main_quality, panels, shown

Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class Section:
    """A part of a page under one heading. folded: a table behind one more click, with its title."""

    title: str
    charts: Sequence[LineChart | Grid] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    table: Table | None = None
    folded: tuple[str, Table] | None = None


@dataclass(frozen=True)
class Page:
    """state: a word for the state of a run. alerts: what whoever reads it should know first. figures: name, value."""

    title: str
    subtitle: str
    state: str
    alerts: list[str]
    figures: list[tuple[str, str]]
    sections: list[Section]


def page_of(run: Run) -> Page:
    """What there is to say of a run, whatever of it is in its folder."""
    crew, name = Crew(run), main_quality([run])
    state, why = state_of(run)
    sections = [_curves(run), _worth(run, name), _costs(run), _clients(run, crew), _work(crew)]
    sections += [_failures(run, crew), _config(run)]
    versions = run.about.get("versions")
    if isinstance(versions, dict):
        sections.append(Section("Versions", table=(["what", "version"], [[k, str(v)] for k, v in versions.items()])))
    warnings = run.result.get("warnings") or []
    return Page(
        title=f"{run.config.get('method', 'A run')} on {run.config.get('data.source', 'unknown data')}",
        subtitle=" · ".join(str(part) for part in _what(run) if part),
        state=state,
        alerts=[*([why] if why else []), *map(str, warnings)],
        figures=_figures(run, name),
        sections=[section for section in sections if section],
    )


def state_of(run: Run) -> tuple[str, str]:
    """A word, and a sentence where it did not go as planned."""
    if run.result:
        stopped = run.result.get("stopped")
        return ("ended early", f"The run ended before its last round: {stopped}.") if stopped else ("completed", "")
    if failed := run.about.get("failed"):
        return "failed", f"The run failed: {failed}"
    at = f"round {shown(run.last('round'))} of {shown(run.last('rounds'))}" if run.rounds else "its start"
    return "no result yet", f"The run has left no result: it is still going, or was ended from outside, after {at}."


def _what(run: Run) -> list[object]:
    config = run.config
    return [config.get("model.name"), config.get("adapter.kind"), f"run {run.name}", run.about.get("started")]


def _figures(run: Run, name: str) -> list[tuple[str, str]]:
    curve, found = run.curve(name), list[tuple[str, str]]()
    if curve:
        values = [value for _, value in curve]
        share, top = is_share(name, values), best(name, values)
        at = next(round_ for round_, value in curve if value == top)
        found.append((name, f"{shown(values[0], share)} → {shown(values[-1], share)}"))
        found.append(
            (f"{'lowest' if lower_is_better(name) else 'highest'} {name}", f"{shown(top, share)} in round {at:g}")
        )
    if run.rounds:
        found.append(("rounds", f"{shown(run.last('round'))} of {shown(run.last('rounds'))}"))
        found.append(("MiB to / from clients", f"{shown(run.last('mib-down'))} / {shown(run.last('mib-up'))}"))
        found.append(("forward passes of an example", shown(run.last("forwards"))))
        found.append(("time", clock(run.last("seconds") or 0.0)))
    if peak := run.peak_mib():
        backprop = run.result.get("peak-mib-backprop")
        beside = f" ({shown(backprop)} with backprop)" if backprop else ""
        found.append(("MiB for a client step", shown(peak) + beside))
    if (epsilon := run.last("epsilon")) is not None:
        found.append((f"epsilon at delta {run.config.get('privacy.delta', '?')}", shown(epsilon)))
    return found


def _curves(run: Run) -> Section:
    charts = []
    for base, names in panels(run.rounds).items():
        series = [(label(name), run.curve(name)) for name in names]
        share = is_share(base, [value for _, points in series for _, value in points])
        charts.append(line_chart(base.capitalize(), "round", series, share))
    sentences = [] if charts else ["No round has been evaluated or trained yet."]
    return Section("What it learned", [chart for chart in charts if chart], sentences)


def _worth(run: Run, name: str) -> Section | None:
    """What the main quality cost."""
    charts = []
    for over, text in COSTS:
        curve = run.curve(name, over)
        share = is_share(name, [value for _, value in curve])
        charts.append(line_chart(f"{name.capitalize()} against {text}", text, [(label(name), curve)], share))
    found = [chart for chart in charts if chart]
    return Section("What that cost", found) if len(run.curve(name)) > 1 else None


def _costs(run: Run) -> Section | None:
    noise = [dict(line.get("noise") or {}, round=line.get("round")) for line in run.rounds]
    charts = [
        line_chart(title, "round", [(name, run.curve(key)) for key, name in curves]) for title, curves in _OVER_ROUNDS
    ]
    cosine = Run(run.name, noise).curve("cosine")
    charts.append(line_chart("Expected cosine of a round's step with its gradient", "round", [("all units", cosine)]))
    sentences = [str(run.result["privacy"])] if run.result.get("privacy") else []
    if why := run.choice.get("reason"):
        sentences.append(f'gradient="auto" chose {why}')
    return Section("Round by round", [chart for chart in charts if chart], sentences + _slow(run))


def _slow(run: Run) -> list[str]:
    """Replies of less than their steps, and after their round."""
    names, config, found = ("partial", "steps", "steps-asked"), run.config, list[str]()
    partial, done, asked = (sum(number(line.get(name)) or 0 for line in run.rounds) for name in names)
    late = sum(len(line.get("late") or ()) for line in run.rounds)
    if partial:
        seconds = config.get("client.deadline-s")
        why = f"client.deadline-s={seconds}" if seconds else "less for slow nodes"
        told = f"{shown(partial)} replies were of part of their local steps"
        found.append(f"With {why}, {told}; in all, {shown(done)} of {shown(asked)} were done.")
    if late:
        told = f"{shown(late)} replies came after their round and were used in a later one"
        found.append(f"{told}, with server.late-discount={config.get('server.late-discount', '?')}.")
    return found


def _clients(run: Run, crew: Crew) -> Section:
    if crew.private:
        return Section("Clients", sentences=[PRIVATE])
    labels = labels_grid(run, crew)
    sentences = ([] if labels else [LABELS_UNKNOWN]) + ([] if crew.hands else [NOT_KEPT])
    charts = [chart for chart in (labels, units_grid(crew), clients_grid(crew)) if chart]
    folded = ("What each node said of itself", node_table(crew)) if crew.nodes else None
    return Section("Clients", charts, sentences, folded=folded)


def _work(crew: Crew) -> Section | None:
    found = None if crew.private else work_table(crew)
    return Section("How each client trained", table=found) if found else None


def _failures(run: Run, crew: Crew) -> Section:
    rows = failures(run, crew)
    lost = sum((number(r.get("asked")) or 0) - (number(r.get("answered")) or 0) for r in run.rounds)
    if not rows and not lost:
        return Section(
            "Failures and refusals", sentences=["None: every client that was asked gave a reply that was used."]
        )
    curves = [(name, run.curve(name)) for name in ("asked", "answered", "refused")]
    chart = line_chart("Clients", "round", [(name, [p for p in points if p[0] >= 1]) for name, points in curves])
    return Section(
        "Failures and refusals",
        [chart] if chart else [],
        [f"{shown(lost)} replies of clients that were asked could not be used."],
        table=(["reason", "times", "rounds", "clients"], rows) if rows else None,
    )


def _config(run: Run) -> Section | None:
    if not run.config:
        return None
    defaults: dict[str, Any] = dict(RunConfig.defaults())
    changed = [
        [key, setting(value), setting(defaults.get(key))]
        for key, value in run.config.items()
        if value != defaults.get(key)
    ]
    rest = [[key, setting(value)] for key, value in run.config.items() if value == defaults.get(key)]
    sentences = [] if changed else ["Every key has its default."]
    return Section(
        "Configuration",
        sentences=sentences,
        table=(["key", "value", "default"], changed) if changed else None,
        folded=(f"{len(rest)} keys with their defaults", (["key", "value"], rest)),
    )


def setting(value: object) -> str:
    """A value of the configuration, as it is written; nothing at all shows as a dash."""
    return "-" if value is None else '""' if value == "" else str(value)


def clock(seconds: float) -> str:
    """The two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


COSTS = (
    ("mib", "MiB sent both ways"),
    ("forwards", "forward passes of an example, all clients"),
    ("seconds", "seconds since the start"),
)
"""What a quality is drawn over beside rounds; "mib" is that of both ways."""
_OVER_ROUNDS = (
    ("MiB since the start, all clients", (("mib-down", "server to clients"), ("mib-up", "clients to server"))),
    ("Forward passes of an example since the start", (("forwards", "all clients"),)),
    ("Seconds of a client's training", (("client-seconds", "slowest client"),)),
    ("MiB for the first step above the loaded model", (("peak-mib", "one client, another each time"),)),
    ("Epsilon", (("epsilon", "all rounds so far"),)),
)
