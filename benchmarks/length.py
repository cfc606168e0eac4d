"""python -m benchmarks.length: how does the memory of activations grow with the sequence, and with the depth?"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.measure import facts, memory
from benchmarks.models import SHAPES
from benchmarks.step import print_answer, print_table, settings_of, settings_parser
from benchmarks.targets import Verdict
from benchmarks.variants import BISECTED, CHECKPOINTED, INFERENCE, OURS, Settings

NAMES = (INFERENCE, CHECKPOINTED, BISECTED, OURS)
QUESTION = "How does the memory of activations grow with the sequence and with the model's depth?"
BOUND = 1.8
"""Checkpointed backprop's activations over ours, at the same micro-batch."""

Curves = Mapping[str, Sequence[float | None]]
"""Variant -> MiB at each length or depth; None where there is no figure."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and draw if asked to."""
    options = _parser().parse_args(arguments)
    settings = settings_of(options)
    blocks = SHAPES[settings.model]["num_hidden_layers"]
    longest = SHAPES[settings.model].get("max_position_embeddings", 512)
    # RoBERTa's positions begin behind the padding token's.
    lengths = [length for length in options.lengths if length <= longest - longest % 2**8] or [settings.length]
    depths = sorted({max(1, settings.layers or blocks * part // 8) for part in (1, 2, 4, 8)})
    if not options.json:
        print(f"{QUESTION} ({', '.join(f'{k} {v}' for k, v in dataclasses.asdict(settings).items())})", flush=True)
    by_length = _curves([dataclasses.replace(settings, length=length) for length in lengths])
    by_depth = _curves([dataclasses.replace(settings, layers=depth) for depth in depths])
    found = [_verdict("length", lengths, by_length), _verdict("depth", depths, by_depth)]
    if options.picture:
        _draw(options.picture, settings, lengths, by_length, depths, by_depth)
    if options.json:
        curves = {"lengths": lengths, "by length": by_length, "depths": depths, "by depth": by_depth}
        answer = [dataclasses.asdict(verdict) for verdict in found]
        told = {"question": QUESTION, "settings": dataclasses.asdict(settings)}
        print(json.dumps(told | {"facts": facts(settings.device), "figures": curves, "answer": answer}))
        return
    _print_curves("tokens", lengths, by_length)
    _print_curves("blocks", depths, by_depth)
    print_answer(found)


def _parser() -> argparse.ArgumentParser:
    parser = settings_parser(device="meta", batch=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--picture", type=Path, help="a file to draw the curves into (.png, .svg)")
    return parser


def _curves(points: Sequence[Settings]) -> dict[str, list[float | None]]:
    return {name: [memory(point, name, micro_batch=0).activations for point in points] for name in NAMES}


def _verdict(axis: str, at: Sequence[int], curves: Curves) -> Verdict:
    """The target is about the last point; how ours came there is said too."""
    first, last, theirs = curves[OURS][0], curves[OURS][-1], curves[CHECKPOINTED][-1]
    grown = f" (ours grows {last / first:.2f}-fold from {at[0]} on)" if first and last else ""
    reached = theirs / last if theirs and last else None
    name = f"checkpointed backprop's activations over ours at {axis} {at[-1]}{grown}"
    return Verdict(name, f">= {BOUND}", reached, reached is not None and reached >= BOUND)


def _print_curves(unit: str, at: Sequence[int], curves: Curves) -> None:
    rows = [("MiB", *(f"{x} {unit}" for x in at))]
    rows += [(name, *("-" if y is None else f"{y:.1f}" for y in curve)) for name, curve in curves.items()]
    print_table("", rows)


def _draw(
    path: Path, settings: Settings, lengths: Sequence[int], by_length: Curves, depths: Sequence[int], by_depth: Curves
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, at, curves, unit in zip(
        axes, (lengths, depths), (by_length, by_depth), ("tokens", "transformer blocks"), strict=True
    ):
        for name, curve in curves.items():
            axis.plot(at, [float("nan") if y is None else y for y in curve], marker="o", label=name)
        axis.set(xlabel=unit, ylabel="activations, MiB", ylim=(0, None))
    axes[0].legend(frameon=False)
    figure.suptitle(f"{settings.model}, batch of {settings.batch}")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
