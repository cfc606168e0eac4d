"""python -m benchmarks.ablations: what does one choice of a method change, everything else being the same?"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.accuracy import compare, keep, parser
from benchmarks.plan import Variant
from benchmarks.rows import partition_keys
from spry_app.config import Scalar
from spry_app.errors import SpryError

QUESTION = "What does one choice of a method change, everything else being the same?"
SPRY = {"method": "spry"}


@dataclass(frozen=True)
class Ablation:
    """A choice and its variants: those with a step size of their own, and those that have that of another's keys."""

    question: str
    variants: Mapping[str, Variant]


def _methods(*names: str) -> dict[str, Variant]:
    return {name: Variant({"method": name}) for name in names}


def _spry(key: str, values: Sequence[Scalar]) -> dict[str, Variant]:
    """SPRY at each value, with the step size that was found at the shared one."""
    return {f"spry, {value}": Variant({**SPRY, key: value}, like=SPRY) for value in values}


def _directions(count: int) -> Variant:
    at_once = next(most for most in range(10, 0, -1) if count % most == 0)
    return Variant({**SPRY, "client.directions": count, "client.directions-at-once": at_once}, like=SPRY)


def _rank(rank: int) -> Variant:
    return Variant({**SPRY, "adapter.rank": rank, "adapter.alpha": float(rank)}, like=SPRY)


def _kind(**keys: Scalar) -> Variant:
    return Variant({**SPRY, "adapter.targets": "", **{f"adapter.{key}": value for key, value in keys.items()}})


ABLATIONS = {
    "K": Ablation("How many directions a batch?", {f"K = {count}": _directions(count) for count in (1, 4, 10, 20, 50)}),
    "clients": Ablation("How many clients a round?", _spry("server.min-train-nodes", (2, 4, 8, 16))),
    "split": Ablation(
        "Does dealing the units out help?",
        _methods("spry", "fedfgd", "fedavg-split", "fedavg", "fedyogi-split", "fedyogi"),
    ),
    "mode": Ablation("One message an epoch, or one an iteration?", _methods("spry", "spry-per-iteration")),
    "adapter": Ablation(
        "Which adapter?",
        {
            "lora, upper two blocks": Variant(SPRY),
            "lora": _kind(kind="lora"),
            "ia3": _kind(kind="ia3"),
            "bitfit": _kind(kind="bitfit"),
            "head alone": _kind(kind="none"),
        },
    ),
    "rank": Ablation("Which rank of LoRA, at the same scale?", {f"rank {rank}": _rank(rank) for rank in (1, 4, 16)}),
    "lora-alpha": Ablation("Which scale of LoRA?", _spry("adapter.alpha", (1.0, 4.0, 16.0))),
    "alpha": Ablation(
        "How alike are the clients' labels?",
        {
            f"{method}, {'iid' if alpha == 'iid' else f'Dirichlet {alpha}'}": Variant(
                {"method": method, **partition_keys(alpha)}, like={"method": method}
            )
            for method in ("spry", "fedyogi")
            for alpha in ("iid", "1.0", "0.1")
        },
    ),
    "head": Ablation(
        "An exact gradient for the head, or one by perturbation as published?",
        {"exact": Variant(SPRY), "forward": Variant({**SPRY, "head-gradient": "forward"})},
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Each of them: search, run, print."""
    options = _parser().parse_args(arguments)
    try:
        for name in options.which.split(","):
            if name not in ABLATIONS:
                raise SpryError(f"--which has {name!r}; it may have {', '.join(ABLATIONS)}, separated by commas.")
        for name in options.which.split(","):
            told = compare(options, ABLATIONS[name].variants, ABLATIONS[name].question)
            keep(options, told, f"ablation-{name}")
    except SpryError as error:
        sys.exit(f"error: {error}")


def _parser() -> argparse.ArgumentParser:
    found = parser(QUESTION)
    found.set_defaults(seeds=2)
    found.add_argument("--which", default=",".join(ABLATIONS), help="names, separated by commas")
    return found


if __name__ == "__main__":
    main()
