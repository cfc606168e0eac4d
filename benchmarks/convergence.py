"""python -m benchmarks.convergence: how near do forward gradients in few dimensions come to backpropagation?

Its rows are in contenders.py, its goals in goals.py. `--sweep d` and `--sweep K` ask how that depends on the number of
trained values and on that of directions.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

from benchmarks.accuracy import Told, compare, keep, parser
from benchmarks.contenders import BLOCKS, QUERY_VALUE, TABLES, TARGETS, Rows, twins, upper
from benchmarks.goals import HEADS, as_json, beside, curves_of, goals, told
from benchmarks.search import PER_STEP_KNOBS
from benchmarks.summary import print_table
from spry_app.errors import SpryError

QUESTION = "How near do forward gradients in few dimensions come to backpropagation?"
SHARED = {TARGETS: QUERY_VALUE, "client.directions": 8, "client.directions-at-once": 8}
"""All blocks are trained unless --upper says otherwise, and as many directions as the new default has."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Each data set at each partition: search, run, print."""
    options = _parser().parse_args(arguments)
    try:
        rows = _rows(options)
        for data in options.data.split(","):
            for alpha in options.alpha.split(","):
                _one(argparse.Namespace(**{**vars(options), "data": data, "alpha": alpha}), rows)
    except SpryError as error:
        sys.exit(f"error: {error}")


def _one(options: argparse.Namespace, rows: Rows) -> None:
    """One data set at one partition."""
    name = "-".join(filter(None, ("convergence", options.sweep, options.data, options.alpha)))
    whole = argparse.Namespace(**{**vars(options), "set": [*SHARED.items(), *options.set]})
    found = compare(whole, rows, f"{QUESTION} ({options.data}, {options.alpha})", PER_STEP_KNOBS)
    keep(options, found, name, **_answer(found, twins(rows), options.clients))


def _answer(found: Told, exact: Mapping[str, str], clients: int) -> dict[str, object]:
    """Print what is read between the rows; the same as plain values."""
    curves, target = curves_of(found.outcomes), found.summary.target
    rows, reached = beside(curves, exact, target, clients), goals(curves, exact, target, clients)
    cells = [(name, *(told(row[head]) for head in HEADS)) for name, row in rows.items()]
    print_table("Bytes up a client and round; times fewer forwards; points of accuracy", ("", *HEADS), cells)
    known = [goal for goal in reached if goal.reached is not None]
    print("", *known, sep="\n")
    return as_json(rows, reached)


def _rows(options: argparse.Namespace) -> Rows:
    """Those asked for. Raises SpryError for one that is not in the table."""
    table = TABLES[options.sweep]()
    names = [name.strip() for name in options.rows.split(",")] if options.rows else list(table)
    unknown = [name for name in names if name not in table]
    if unknown:
        raise SpryError(f"--rows has {unknown[0]!r}; it may have {', '.join(table)}, separated by commas.")
    chosen = {name: table[name] for name in names}
    return upper(chosen, options.upper) if options.upper else chosen


def _parser() -> argparse.ArgumentParser:
    found = parser(QUESTION)
    found.set_defaults(alpha="iid", search_part=2)
    found.add_argument("--sweep", choices=list(TABLES), default="", help="d: numbers trained; K: directions")
    found.add_argument("--upper", type=int, default=0, choices=range(1, BLOCKS + 1), help="of the blocks alone; 0: all")
    found.add_argument("--rows", default="", help="names, separated by commas; empty: all")
    return found


if __name__ == "__main__":
    main()
