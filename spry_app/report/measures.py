"""What the names in metrics.jsonl stand for: which of them say how good a model is, and which way is better."""

from collections.abc import Sequence
from typing import Any

from spry_app.report.folder import Row, Run, number

_SPENT = ("mib", "mib-up", "mib-down", "forwards", "seconds", "client-seconds", "peak-mib", "epsilon")
_COUNTED = ("round", "rounds", "asked", "answered", "refused", "clipped", "sampled-from", "reasons", "noise")
_DONE = ("partial", "steps", "steps-asked", "late")
NO_QUALITY = frozenset((*_SPENT, *_COUNTED, *_DONE))
"""Names in a line of metrics.jsonl that say what a round was or cost; all other numbers say what it gave."""
_OF_WHOM = {"train-": "training batches", "personalised-": "personalised, held-out"}
"""Prefixes of a quality -> on what it was measured."""
_LOWER_IS_BETTER = ("loss", "perplexity", "error")


def qualities(rounds: Sequence[Row]) -> list[str]:
    """Names of what was measured of the model, in their order in the lines."""
    names = dict.fromkeys(name for line in rounds for name in line if name not in NO_QUALITY)
    return [name for name in names if any(number(line.get(name)) is not None for line in rounds)]


def panels(rounds: Sequence[Row]) -> dict[str, list[str]]:
    """Quality without its prefix -> the names measured of it, which belong into one chart."""
    found: dict[str, list[str]] = {}
    for name in qualities(rounds):
        found.setdefault(_split(name)[1], []).append(name)
    return found


def label(name: str) -> str:
    """Whose and on what a quality was measured."""
    return _OF_WHOM.get(_split(name)[0], "global model, held-out")


def heading(name: str) -> str:
    """Of a chart that has this quality alone."""
    return f"{_split(name)[1].capitalize()} ({label(name)})"


def main_quality(runs: Sequence[Run]) -> str:
    """By which runs are judged: their task's main metric, that of most runs; where none was measured, the first quality
    of the global model that is not a loss, else the first.
    """
    names = list(dict.fromkeys(name for run in runs for name in qualities(run.rounds)))
    wanted = [name for run in runs for line in run.rounds if (name := line.get("main-metric")) in names]
    if wanted:
        return str(max(wanted, key=lambda name: sum(bool(run.curve(name)) for run in runs)))
    plain = [name for name in names if not _split(name)[0]] or names
    return next((name for name in plain if not lower_is_better(name)), next(iter(plain), ""))


def lower_is_better(name: str) -> bool:
    return any(word in name for word in _LOWER_IS_BETTER)


def best(name: str, values: Sequence[float]) -> float:
    return min(values) if lower_is_better(name) else max(values)


def reaches(name: str, value: float, target: float) -> bool:
    return value <= target if lower_is_better(name) else value >= target


def is_share(name: str, values: Sequence[float]) -> bool:
    """Whether it is shown in per cent."""
    return not lower_is_better(name) and all(0 <= value <= 1 for value in values)


def shown(value: Any, share: bool = False) -> str:
    """A number as people read it: three or four digits that matter, thousands apart; in per cent if it is a share."""
    found = number(value)
    if found is None:
        return "-"
    if share:
        return f"{100 * found:.1f} %"
    if found and abs(found) < 1e-3:
        return f"{found:.2e}"
    if abs(found) >= 1000 or found == int(found):
        return f"{found:,.0f}"
    return f"{found:.{4 if abs(found) >= 1 else 3}g}"


def _split(name: str) -> tuple[str, str]:
    prefix = next((prefix for prefix in _OF_WHOM if name.startswith(prefix)), "")
    return prefix, name.removeprefix(prefix)
