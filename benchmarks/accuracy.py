"""python -m benchmarks.accuracy: which method learns how much for what it costs, each with a step size of its own?"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import Cells, Outcome
from benchmarks.measure import facts
from benchmarks.plan import SEARCH_PART, TOP_BLOCKS, Plan, Variant
from benchmarks.rows import DATA_DIR, DATA_HELP, split, with_fewer_tests
from benchmarks.search import KNOBS, Knobs, Steps
from benchmarks.summary import Summary, draw, print_summary, summarise
from spry_app.config import RunConfig, Scalar
from spry_app.errors import SpryError
from spry_app.methods import METHODS, get_method


@dataclass(frozen=True)
class Told:
    """What a comparison came to. outcomes: a run a seed. without: variants for which no step size worked."""

    summary: Summary
    outcomes: Mapping[str, Sequence[Outcome]]
    plan: Plan
    steps: Steps
    without: list[str]


QUESTION = "Which method learns how much for what it costs, each with a step size of its own?"


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, run, print."""
    options = _parser().parse_args(arguments)
    name = f"accuracy-{options.data}-{options.alpha}"
    try:
        variants = {method: Variant({"method": method}) for method in options.methods.split(",")}
        keep(options, compare(options, variants, QUESTION), name)
    except SpryError as error:
        sys.exit(f"error: {error}")


def compare(options: argparse.Namespace, variants: Mapping[str, Variant], question: str, knobs: Knobs = KNOBS) -> Told:
    """Run variants of one plan beside each other and print how they did."""
    plan = plan_of(options)
    for variant in variants.values():
        get_method(RunConfig.from_flower(plan.final(variant.keys, 0)))  # a wrong key is refused before anything runs
    cells = Cells(options.out / "cells", options.jobs, str(facts("cpu")["commit"]))
    try:
        steps = Steps(cells, plan, knobs)
        found = steps.find(variants)
        longer = {name: variant.longer for name, variant in variants.items()}
        outcomes = run_all(cells, plan, found, options.seeds, longer)
    finally:
        cells.close()
    summary = summarise(question, outcomes, options.target, options.budget)
    print_summary(summary, steps.done)
    without = sorted(set(variants) - set(found))
    if without:
        print(f"No step size worked for {', '.join(without)}.")
    return Told(summary, outcomes, plan, steps, without)


def keep(options: argparse.Namespace, told: Told, name: str, **more: Any) -> None:
    """NAME.json, with `more` in it, and NAME.png in the folder of the benchmark: all but the cells themselves."""
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "data_dir", "jobs", "set")}
    record = {
        **told.summary.as_json(),
        **more,
        "settings": settings,
        "shared": dict(told.plan.shared),
        "facts": facts("cpu"),
        "search": [one.record() for one in told.steps.done],
        "no step size worked for": told.without,
    }
    (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(told.summary, options.out / f"{name}.png")


def run_all(
    cells: Cells,
    plan: Plan,
    variants: Mapping[str, Mapping[str, Scalar]],
    seeds: int,
    longer: Mapping[str, int] = {},
) -> dict[str, list[Outcome]]:
    """Every variant with every seed. The seed comes first: a process then finds the model it has loaded. longer: of
    some, how many times as many rounds they have.
    """
    wanted = [
        (name, plan.cell(plan.final(keys, seed, longer.get(name, 1))))
        for seed in range(seeds)
        for name, keys in variants.items()
    ]
    found = cells.run([cell for _, cell in wanted], "Runs of the table")
    outcomes: dict[str, list[Outcome]] = {name: [] for name in variants}
    for (name, _), outcome in zip(wanted, found, strict=True):
        outcomes[name].append(outcome)
    return outcomes


def plan_of(options: argparse.Namespace) -> Plan:
    """What the arguments say."""
    rows = split(options.data, options.data_dir, options.out / "rows", options.train_rows, options.choice_rows)
    if options.test_rows:
        rows = with_fewer_tests(rows, options.out / "rows", options.data, options.test_rows)
    shared: dict[str, Scalar] = {
        "adapter.targets": TOP_BLOCKS,
        "client.batch-size": 8,
        "client.micro-batch": 0,
        "client.local-steps": 5,
        "client.optimizer": "adam",
        "client.directions": 4,
        "client.directions-at-once": 4,
        "data.holdout": 0.2,
        **dict(options.set),
    }
    return Plan(
        split=rows,
        alpha=options.alpha,
        nodes=options.nodes,
        clients=options.clients,
        rounds=options.rounds,
        evaluations=options.evaluations,
        shared=shared,
        search_part=options.search_part,
        own=tuple(options.own),
    )


def parser(question: str) -> argparse.ArgumentParser:
    """Arguments of every benchmark of accuracy."""
    found = argparse.ArgumentParser(description=question, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.set_defaults(own=())  # node config of each node
    found.add_argument("--data", default="sst2", help=DATA_HELP)
    found.add_argument("--data-dir", type=Path, default=Path(DATA_DIR), help="a folder a data set (SPRY_DATA)")
    found.add_argument("--alpha", default="1.0", help='"iid", or the concentration of the Dirichlet partition')
    found.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    found.add_argument("--rounds", type=int, default=20, help="of a run with the shared number of local steps")
    found.add_argument("--evaluations", type=int, default=4, help="after training has begun, at equal distances")
    found.add_argument("--nodes", type=int, default=20, help="over which the rows are dealt")
    found.add_argument("--clients", type=int, default=6, help="a round")
    found.add_argument("--train-rows", type=int, default=4000, help="at most; 0: all")
    found.add_argument("--search-part", type=int, default=SEARCH_PART, help="step sizes: runs of one of so many rounds")
    found.add_argument("--choice-rows", type=int, default=400, help="of the training file, to choose step sizes on")
    found.add_argument("--test-rows", type=int, default=0, help="of the evaluation file, drawn once; 0: all")
    found.add_argument("--budget", type=float, default=0.0, help="forwards to compare at; 0: what all have spent")
    found.add_argument("--target", type=float, default=0.0, help="accuracy to reach; 0: half of the best one's gain")
    found.add_argument(
        "--set", type=key_and_value, action="append", default=[], metavar="KEY=VALUE", help="of all runs"
    )
    found.add_argument("--jobs", type=int, default=2, help="processes, of one thread each; 0: this one")
    found.add_argument(
        "--out", type=Path, default=Path("outputs/accuracy"), help="finished runs in here are not run again"
    )
    return found


def _parser() -> argparse.ArgumentParser:
    found = parser(QUESTION)
    found.add_argument("--methods", default=",".join(METHODS), help="names, separated by commas")
    return found


def key_and_value(told: str) -> tuple[str, Scalar]:
    """KEY=VALUE of the command line; a value that is not JSON is text."""
    key, _, value = told.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


if __name__ == "__main__":
    main()
