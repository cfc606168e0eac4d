"""What the boxes of a fleet did in the runs of one row, by their size: pure readings of what was written down. Nothing
is run here.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.boxes import Box, Fleet
from benchmarks.cells import Outcome
from benchmarks.watched import Work, slowest_s


@dataclass(frozen=True)
class OfSize:
    """trained: nodes of whom a reply was used, as a mean over runs; left_out: that could not be used at all. refused:
    tasks that were. peak_mib: the most that a measured step took; None where none was. round_s: that the slowest of
    them computes, simulated. dealt: the commonest share, as "units x gradient" (empty for the method's).
    """

    box: Box
    trained: float
    left_out: float
    refused: float
    peak_mib: float | None
    round_s: float
    dealt: str


@dataclass(frozen=True)
class Shares:
    """rows: of the nodes whose replies were used, of all; bytes_up: of a reply, and ms a pass, measured here: means.
    ms is of the rounds that measured no memory, which takes time.
    """

    rows: float
    bytes_up: float
    ms: float
    sizes: tuple[OfSize, ...]


def shares(fleet: Fleet, outcomes: Sequence[Outcome]) -> Shares:
    """outcomes: runs of one row that came through."""
    runs = [one.work for one in outcomes]
    done = [item for work in runs for item in work if "forwards" in item]
    plain = [item for item in done if not item["peak-mib"]] or done
    return Shares(
        rows=statistics.fmean(_rows(work) for work in runs),
        bytes_up=statistics.fmean(item["bytes"] for item in done),
        ms=1e3 * sum(item["s"] for item in plain) / sum(item["forwards"] for item in plain),
        sizes=tuple(_of_size(box, places, runs) for box, places in _places(fleet)),
    )


def _places(fleet: Fleet) -> Iterator[tuple[Box, range]]:
    first = 0
    for box in fleet.boxes:
        yield box, range(first, first + box.count)
        first += box.count


def _rows(work: Sequence[Work]) -> float:
    held: dict[int, float] = {item["partition"]: item["rows"] for item in work if "rows" in item}
    return sum(held[node] for node in {item["partition"] for item in work if "forwards" in item})


def _of_size(box: Box, places: range, runs: Sequence[Sequence[Work]]) -> OfSize:
    own = [[item for item in work if item["partition"] in places] for work in runs]
    done = [[item for item in work if "forwards" in item] for work in own]
    refused = [[item for item in work if "refused" in item] for work in own]
    measured = [item["peak-mib"] for work in done for item in work if item["peak-mib"]]
    dealt = Counter((item["units"], item["gradient"]) for work in done for item in work)
    (units, gradient), _ = dealt.most_common(1)[0] if dealt else ((0, "-"), 0)

    def mean(count: Callable[[int], float]) -> float:
        return statistics.fmean(map(count, range(len(runs))))

    return OfSize(
        box=box,
        trained=mean(lambda run: len({item["partition"] for item in done[run]})),
        left_out=mean(lambda run: len({item["partition"] for item in refused[run] if not item["round"]})),
        refused=mean(lambda run: sum(item["round"] > 0 for item in refused[run])),
        peak_mib=max(measured, default=None),
        round_s=mean(lambda run: statistics.fmean(slowest_s(done[run]).values() or (0.0,))),
        dealt=f"{units} x {gradient}" if dealt else "",
    )


def table(found: dict[str, Shares], rows: int) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and lines, a row a size of box. rows: of all nodes."""
    head = ["", "rows used", "bytes up", "ms a pass here", "box", "trained", "left out", "refused"]
    head += ["peak MiB", "budget", "s a round"]
    lines: list[tuple[str, ...]] = []
    for name, one in found.items():
        for place, of in enumerate(one.sizes):
            own = (
                (name, f"{one.rows:.0f} of {rows}", f"{one.bytes_up:.0f}", f"{one.ms:.2f}") if not place else ("",) * 4
            )
            lines.append((*own, of.box.name, *_numbers(of)))
    return head, lines


def _numbers(of: OfSize) -> tuple[str, ...]:
    peak = "-" if of.peak_mib is None else f"{of.peak_mib:.3f}"
    counts = (f"{of.trained:g} of {of.box.count}", f"{of.left_out:g}", f"{of.refused:g}")
    return (*counts, peak, f"{of.box.budget_mib:.3f}", f"{of.round_s:.2f}")
