"""Which of the ways that fit is to be taken, and why. Pure functions of rows; nothing here runs or measures."""

from collections.abc import Sequence
from dataclasses import dataclass

from spry_app.methods.noise import relative_noise
from spry_app.planner.rows import Row


@dataclass(frozen=True)
class Advice:
    """row: which of the rows; None where none fits. reason: a sentence on why, or on what would fit."""

    row: int | None
    reason: str


def passes_for_an_exact_step(row: Row) -> float:
    """Forward passes of a client for as much progress as one step along the exact gradient makes.

    A step along a mean with expected cosine c makes c^2 as much: 1 / c^2 = 1 + E|error|^2 / |gradient|^2, with the
    directions of all clients that hold the same units.
    """
    return row.forwards * (1 + relative_noise(row.perturbed, row.directions * row.holders, row.directions_kind))


def advise(rows: Sequence[Row], limit_mib: float) -> Advice:
    """The first row is the run as it is set. Ways on its own units come first, any other where none of those fits."""
    fitting = [index for index, row in enumerate(rows) if row.fits]
    if not fitting:
        return Advice(None, _what_would(rows, limit_mib))
    own = [index for index in fitting if rows[index].hand == rows[0].hand] or fitting
    best = min(own, key=lambda index: (passes_for_an_exact_step(rows[index]), rows[index].total_mib))
    return Advice(best, _reason(rows[best], [row for row in rows if row.hand == rows[best].hand], limit_mib))


def _reason(best: Row, rivals: Sequence[Row], limit_mib: float) -> str:
    takes = f"it takes {best.total_mib:,.0f} of {limit_mib:,.0f} MiB"
    if not best.perturbed:
        slopes = [row for row in rivals if row.fits and row.perturbed]
        found = f"{best.gradient}: its gradient is exact, and {takes}, for {best.forwards:,.0f} forward passes a step."
        if not slopes:
            return found
        rival = min(slopes, key=passes_for_an_exact_step)
        times = passes_for_an_exact_step(rival) / best.forwards
        return (
            f"{found} For as much progress {rival.gradient} with K={rival.directions} along {rival.perturbed:,} "
            f"numbers, on {rival.holders} clients at once, takes about {times:,.0f} times as many; it sends "
            f"{_mib(rival.up_bytes)} a round, this {_mib(best.up_bytes)}."
        )
    exact = [row for row in rivals if not row.perturbed]
    least = min((row.total_mib for row in exact), default=0.0)
    why = f"no backpropagation fits (the least takes {least:,.0f} MiB)" if exact else "nothing else is allowed here"
    return (
        f"{best.gradient}: {why}, and of what fits this needs the fewest forward passes for as much progress; {takes}."
    )


def _what_would(rows: Sequence[Row], limit_mib: float) -> str:
    able = [row for row in rows if not row.error]
    if not able:
        return f"No way to a gradient is possible: {rows[0].error}"
    least = min(able, key=lambda row: row.total_mib)
    return (
        f"Nothing fits into {limit_mib:,.0f} MiB. The least is {least.gradient} ({least.hand} units) with one example "
        f"at once: {least.total_mib:,.0f} MiB, of which the weights are {least.weights_mib:,.0f}."
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
