"""python -m benchmarks.cosine: how near is the mean estimate of a round to the true gradient on the same rows?

Measured at the start and after a short training by backpropagation, beside what the formulas of the variance say.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from flwr.serverapp import Grid

from benchmarks.accuracy import key_and_value
from benchmarks.angles import cosine, expected_cosine, flat, unlikeness
from benchmarks.contenders import ADAPTERS, BACKPROP, DEFAULT_ADAPTER
from benchmarks.curves import Figure, figure
from benchmarks.local_grid import LocalGrid, identify
from benchmarks.measure import facts
from benchmarks.one_round import Rounds, Seen
from benchmarks.rows import DATA_DIR, DATA_HELP, data_keys, partition_keys, split
from benchmarks.summary import print_table
from spry_app.client.node import forget_nodes
from spry_app.config import RunConfig, Scalar
from spry_app.errors import SpryError
from spry_app.protocol import Tensors, from_arrays
from spry_app.server.run import federate

QUESTION = "How near is the mean estimate of a round to the true gradient on the same rows?"
Keys = Mapping[str, Scalar]


@dataclass(frozen=True)
class Case:
    """directions: K. kind: of the directions. assign: who perturbs which units."""

    adapter: str
    clients: int
    assign: str
    kind: str
    directions: int

    @property
    def keys(self) -> Keys:
        """Of its run, beside those that all share."""
        at_once = min(self.directions, 16)
        sizes = {"client.directions": self.directions, "client.directions-at-once": at_once}
        kind = {} if self.kind == "gaussian" else {"directions": self.kind}
        return {
            "preset": "",
            "method": "spry-per-iteration",
            "assign": self.assign,
            **sizes,
            **kind,
            **ADAPTERS[self.adapter],
        }


@dataclass(frozen=True)
class Found:
    """Over rounds. when: "start" or "trained". dimension: numbers that a client perturbs, as a mean. cosine: of the
    mean estimate and the true gradient. expected: by the formula, for clients as unlike as they are. alike: if not.
    """

    case: Case
    when: str
    dimension: float
    cosine: Figure
    expected: Figure
    alike: Figure


def compare(case: Case, when: str, estimates: Sequence[Seen], exact: Sequence[Seen]) -> Found:
    """The rounds of one case beside the true gradients of the same rounds."""
    names = sorted({name for one in estimates[0].perturbed for name in one})
    pairs = list(zip(estimates, exact, strict=True))
    return Found(
        case,
        when,
        sum(sum(one.values()) for one in estimates[0].perturbed) / case.clients,
        figure([cosine(flat(ours.mean, names), flat(true.mean, names)) for ours, true in pairs]),
        figure([expected_cosine(case.kind, case.directions, ours, unlikeness(true, names)) for ours, true in pairs]),
        figure([expected_cosine(case.kind, case.directions, ours, 1.0) for ours, _ in pairs]),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    options = _parser().parse_args(arguments)
    try:
        cases, shared = _cases(options), _shared(options)
        identify()
        found = [one for group in _by_federation(cases) for one in _measure(group, shared, options)]
    except SpryError as error:
        sys.exit(f"error: {error}")
    print(QUESTION)
    heads = ("adapter", "clients", "assign", "d of a client", "directions", "K", "when", "cosine", "expected", "alike")
    print_table(f"Cosine, as a mean over {options.rounds} rounds", heads, [_row(one) for one in found])
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "question": QUESTION,
        "settings": {key: value for key, value in vars(options).items() if key not in ("out", "data_dir")},
        "facts": facts("cpu"),
        "figures": [asdict(one) for one in found],
    }
    (options.out / f"cosine-{options.data}-{options.alpha}.json").write_text(json.dumps(record, indent=1) + "\n")


def _measure(cases: Sequence[Case], shared: Keys, options: argparse.Namespace) -> Iterator[Found]:
    """Those that share an adapter and clients, and so the true gradients."""
    clients = cases[0].clients
    own: Keys = {**shared, **ADAPTERS[cases[0].adapter]}
    for case in cases:
        RunConfig.from_flower({**own, **case.keys})  # a wrong key is refused before anything is measured
    with tempfile.TemporaryDirectory(prefix="spry-cosine-") as folder:
        truth = Rounds({**own, "method": "fedsgd"}, clients, Path(folder, "truth"))
        at = {"start": truth.start, "trained": _trained(own, clients, Path(folder, "trained"), options)}
        rounds = range(1, options.rounds + 1)
        exact = {when: [truth.at(tensors, round_) for round_ in rounds] for when, tensors in at.items()}
        for number, case in enumerate(cases):
            forget_nodes()
            ours = Rounds({**own, **case.keys}, clients, Path(folder, str(number)))
            for when, tensors in at.items():
                yield compare(case, when, [ours.at(tensors, round_) for round_ in rounds], exact[when])
                print(f"{case} {when}", file=sys.stderr, flush=True)


def _trained(shared: Keys, clients: int, folder: Path, options: argparse.Namespace) -> Tensors:
    """By backpropagation, a server's step a batch."""
    keys: Keys = {
        **shared,
        **BACKPROP,
        "num-server-rounds": options.train_rounds,
        "server.evaluate-every": options.train_rounds,
        "server.min-train-nodes": clients,
    }
    done = federate(cast(Grid, LocalGrid(clients, keys)), RunConfig.from_flower(keys), folder)
    return from_arrays(done.arrays)


def _by_federation(cases: Iterable[Case]) -> list[list[Case]]:
    """In their order."""
    return [list(group) for _, group in itertools.groupby(cases, key=lambda case: (case.adapter, case.clients))]


def _cases(options: argparse.Namespace) -> list[Case]:
    """All combinations. Raises SpryError for an adapter that is not in the table."""
    adapters = options.adapters.split(",")
    unknown = [name for name in adapters if name not in ADAPTERS]
    if unknown:
        raise SpryError(f"--adapters has {unknown[0]!r}; it may have {', '.join(ADAPTERS)}, separated by commas.")
    lists = (options.clients, options.assign, options.kinds, options.directions)
    clients, assigns, kinds, directions = (told.split(",") for told in lists)
    combined = itertools.product(adapters, map(int, clients), assigns, kinds, map(int, directions))
    return [Case(*one) for one in combined]


def _shared(options: argparse.Namespace) -> dict[str, Scalar]:
    rows = split(options.data, options.data_dir, options.out / "rows", options.train_rows, options.choice_rows)
    return {
        **data_keys(rows, rows.choice),
        **partition_keys(options.alpha),
        "data.holdout": 0.0,
        "client.batch-size": options.batch,
        "client.micro-batch": 0,
        **dict(options.set),
    }


def _row(found: Found) -> tuple[str, ...]:
    case = found.case
    told = (f"{one.mean:.3f}" if one.mean is not None else "-" for one in (found.expected, found.alike))
    spread = f" ± {found.cosine.spread:.3f}" if found.cosine.spread is not None else ""
    numbers = (f"{found.dimension:.0f}", case.kind, str(case.directions), found.when)
    return (case.adapter, str(case.clients), case.assign, *numbers, f"{found.cosine.mean:.3f}{spread}", *told)


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=QUESTION, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--adapters", default=f"lora,{DEFAULT_ADAPTER}", help="names in contenders.py, with commas")
    found.add_argument("--directions", default="1,8", help="K, with commas")
    found.add_argument("--kinds", default="gaussian,orthogonal", help="of directions")
    found.add_argument("--assign", default="every-unit", help="who perturbs what: every-unit, cyclic, by-depth")
    found.add_argument("--clients", default="6", help="a round, with commas")
    found.add_argument("--rounds", type=int, default=10, help="with seeds of their own, at the same tensors")
    found.add_argument("--train-rounds", type=int, default=30, help="by backpropagation, before the second measurement")
    found.add_argument("--batch", type=int, default=8, help="rows of a client")
    found.add_argument("--data", default="sst2", help=DATA_HELP)
    found.add_argument("--data-dir", type=Path, default=Path(DATA_DIR), help="a folder a data set (SPRY_DATA)")
    found.add_argument("--alpha", default="iid", help='"iid", or the concentration of the Dirichlet partition')
    found.add_argument("--train-rows", type=int, default=1200, help="at most; 0: all")
    found.add_argument("--choice-rows", type=int, default=100, help="set apart to score the short training")
    found.add_argument(
        "--set", type=key_and_value, action="append", default=[], metavar="KEY=VALUE", help="of all runs"
    )
    found.add_argument("--out", type=Path, default=Path("outputs/cosine"))
    return found


if __name__ == "__main__":
    main()
