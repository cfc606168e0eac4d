"""python -m benchmarks.fleet: what do unequal devices learn together, each with the gradient that it can take?

With --shape it says instead what a large model of that shape would take on each of them (large_boxes.py).
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.accuracy import Told, compare, keep, parser, plan_of
from benchmarks.boxes import EXACT, Box, Fleet, fleet
from benchmarks.contenders import ADAPTERS, QUERY_VALUE, TARGETS
from benchmarks.curves import Curve, Figure
from benchmarks.goals import Curves, curves_of, difference
from benchmarks.goals import told as said
from benchmarks.large_boxes import HEAD, LARGE, lines, planned
from benchmarks.plan import Variant
from benchmarks.search import KNOBS, Knob, Knobs
from benchmarks.shares import Shares, shares, table
from benchmarks.summary import print_table
from spry_app.config import Scalar
from spry_app.errors import SpryError

QUESTION = "What do unequal devices learn together, each with the gradient that it can take?"
Keys = Mapping[str, Scalar]
ADAPTER: Keys = {**ADAPTERS["core (query and value)"], "adapter.rank": 4, "adapter.alpha": 4.0}
"""192 numbers on MiniLM: slopes have a chance."""
SPRY: Keys = {"method": "spry", **ADAPTER}
BACKPROP: Keys = {"method": "fedyogi", "gradient": EXACT, **ADAPTER}
MIXED: Keys = {**SPRY, "assign": "by-device", "server.weighting": "precision"}
HEAD_ALONE: Keys = {"method": "fedyogi", "adapter.kind": "none"}
ROWS: dict[str, Variant] = {
    "head alone, every box": Variant(HEAD_ALONE, longer=2),
    "SPRY, every box": Variant(SPRY),
    "zeroth order, every box": Variant({**SPRY, "gradient": "central-difference"}, like=SPRY),
    "backprop, boxes that hold it": Variant(BACKPROP, longer=3),
    "bisected, boxes that hold it": Variant({**BACKPROP, "gradient": "bisected-backprop"}, longer=2),
    "mixed": Variant(MIXED),
    "mixed, weighted by examples": Variant({**MIXED, "server.weighting": "examples"}, like=MIXED),
}
"""All have an exact head and the server's Yogi. Central differences measure the slopes of forward mode, and have its
step sizes; a mixed fleet has the same however it is weighted; all are searched on these boxes. Checkpointed backprop on
all units is refused by the boxes that do not hold it, which leaves them out; its rounds are short, so it has three
times as many; bisected, which more boxes hold, twice, as has the head alone.
"""
SHARED: Keys = {
    TARGETS: QUERY_VALUE,
    "client.local-steps": 2,
    "client.batch-size": 4,
    "client.directions": 2,
    "client.optimizer": "sgd",
    "client.directions-at-once": 1,
    "client.prefix-cache-mib": 0,
    "data.holdout": 0.0,
}
"""Clients step as the app does by default. In a tight budget no directions share a pass, and paces are told so. Hidden
states that are kept from pass to pass would be memory that a budget for a step does not count.
"""
AGAINST = {"at the end": "", "at equal rounds": "rounds", "at equal simulated s": "simulated s"}
OWN = "the same by each row's own ms a pass"
"""A tangent or a graph takes more time than the passes that it counts for, where one example passes at a time."""
FLEET_KNOBS: Knobs = {
    **KNOBS,
    ("yogi", "sgd"): Knob("server.learning-rate", "server.head-learning-rate", 3e-3, 1e-2, "fedyogi", "sgd"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Each data set: search, run, print; or each shape."""
    options = _parser().parse_args(arguments)
    try:
        rows = _rows(options.rows)
        for shape in filter(None, options.shape.split(",")):
            _large(options, shape)
        for data in filter(None, options.data.split(",") if not options.shape else ()):
            _one(argparse.Namespace(**{**vars(options), "data": data}), rows)
    except SpryError as error:
        sys.exit(f"error: {error}")


def _large(options: argparse.Namespace, shape: str) -> None:
    """Of every size of box."""
    if shape not in LARGE:
        raise SpryError(f"--shape has {shape!r}; it may have {', '.join(LARGE)}, separated by commas.")
    found = list(planned(shape, options.sizes, options.pass_ms, options.reserve_gib))
    print_table(f"What {shape} would take", HEAD, [line for one in found for line in lines(one)])


def _one(options: argparse.Namespace, rows: Mapping[str, Variant]) -> None:
    """One data set."""
    count, sizes = sum(box.count for box in options.sizes), [asdict(box) for box in options.sizes]
    own = {"set": [*SHARED.items(), *options.set], "nodes": count, "clients": count, "sizes": sizes}
    whole = argparse.Namespace(**{**vars(options), **own})
    options.out.mkdir(parents=True, exist_ok=True)
    plan, kept = plan_of(whole), options.out / f"fleet-{options.data}-ms.json"
    boxes = fleet(plan, MIXED, HEAD_ALONE, options.sizes, options.budgets, kept)
    _print_boxes(boxes)
    whole.own = boxes.own()
    told = compare(whole, rows, f"{QUESTION} ({options.data}, {options.alpha})", FLEET_KNOBS)
    found = _shares(boxes, told)
    print_table("By size of box", *table(found, len(told.plan.split.train.read_text().strip().split("\n"))))
    against = _against(curves_of(told.outcomes), found, boxes.forward_ms)
    cells = [(name, *(said(found) for found in row.values())) for name, row in against.items()]
    print_table("What the mixed fleet has more, points, of equal seeds", ("", *AGAINST, OWN), cells)
    more = {
        "fleet": asdict(boxes),
        "shares": {name: asdict(one) for name, one in found.items()},
        "mixed less others": {
            name: {head: asdict(figure) for head, figure in row.items()} for name, row in against.items()
        },
    }
    keep(whole, told, f"fleet-{options.data}-{options.alpha}", **more)


def _against(curves: Curves, found: Mapping[str, Shares], ms: float) -> dict[str, dict[str, Figure]]:
    """Row -> AGAINST, and OWN -> how many points more accurate the mixed fleet is, at what both have spent. ms: a pass,
    by which the curves are timed.
    """
    if "mixed" not in curves:
        return {}
    own = {name: [_slowed(one, found[name].ms / ms) for one in runs] for name, runs in curves.items()}
    return {
        name: {head: difference(curves["mixed"], runs, axis) for head, axis in AGAINST.items()}
        | {OWN: difference(own["mixed"], own[name], "simulated s")}
        for name, runs in curves.items()
        if name != "mixed"
    }


def _slowed(curve: Curve, times: float) -> Curve:
    """As if every pass had taken so many times as long."""
    return [{**line, "simulated-s": times * line["simulated-s"]} for line in curve]


def _shares(boxes: Fleet, told: Told) -> dict[str, Shares]:
    through = {name: [one for one in found if not one.error] for name, found in told.outcomes.items()}
    return {name: shares(boxes, found) for name, found in through.items() if found}


def _print_boxes(boxes: Fleet) -> None:
    """How the budgets came about."""
    sizes = [(box.name, f"{box.count}", f"{box.budget_mib:g}", f"{box.slowness:g}") for box in boxes.boxes]
    print_table("The fleet", ("", "nodes", "MiB a step", "times as slow"), sizes)
    steps = [(name, f"{mib:.3f}") for name, mib in boxes.steps.items()]
    print_table("Smallest steps, MiB, by which the budgets are set", ("", "MiB"), steps)
    print(f"\nA forward pass of an example takes {boxes.forward_ms:g} ms here, on the fastest box.")


def _rows(asked: str) -> dict[str, Variant]:
    """Those asked for. Raises SpryError for one that is not in the table."""
    names = [name.strip() for name in asked.split(";")] if asked else list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        raise SpryError(f"--rows has {unknown[0]!r}; it may have {'; '.join(ROWS)}, separated by semicolons.")
    return {name: ROWS[name] for name in names}


def _numbers(told: str) -> list[float]:
    return [float(number) for number in told.split(",")]


def _sizes(told: str) -> list[Box]:
    """COUNTxGIBxSLOWNESS, separated by commas."""
    found = [[float(number) for number in box.split("x")] for box in told.split(",")]
    return [Box(gib, int(count), slowness) for count, gib, slowness in found]


def _parser() -> argparse.ArgumentParser:
    found = parser(QUESTION)
    found.set_defaults(data="sst2,ag_news", alpha="0.5", seeds=2, rounds=12, evaluations=4, search_part=1, jobs=1)
    found.set_defaults(train_rows=2000, choice_rows=400, test_rows=400, out=Path("outputs/fleet"))
    found.add_argument(
        "--sizes", type=_sizes, default="2x24x1,4x8x2,4x4x4", help="of boxes: how many x GB x times as slow; sorted"
    )
    found.add_argument("--rows", default="", help="names, separated by semicolons; empty: all")
    found.add_argument("--budgets", type=_numbers, default=[], help="MiB of each size of box; empty: from the steps")
    found.add_argument("--shape", default="", help=f"instead of training: {', '.join(LARGE)}")
    found.add_argument("--pass-ms", type=float, default=100.0, help="of a shape on the fastest box, an example")
    found.add_argument("--reserve-gib", type=float, default=0.5, help="that a process takes beside the model")
    return found


if __name__ == "__main__":
    main()
