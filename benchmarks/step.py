"""python -m benchmarks.step: what does one step cost, in time and memory, and does ours reach its targets?"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence

import torch

from benchmarks.measure import facts, memory, times
from benchmarks.models import DTYPES, SHAPES, TASKS
from benchmarks.targets import Slicing, Verdict, verdicts
from benchmarks.variants import BACKPROP, INFERENCE, UNITS, Settings, prepare, variants
from spry_app.autodiff.memory import settle_allocator

COLUMNS = ("", "ms", "/ backprop", "/ inference", "activations MiB", "total MiB", "resident MiB")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print."""
    options = _parser().parse_args(arguments)
    settings = settings_of(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.settle_allocator:
        settle_allocator()
    question = _question(settings)
    if not options.json:
        print(question, flush=True)
    whole, sliced = (_measure(settings, micro_batch, options) for micro_batch in (0, 1))
    found = verdicts(settings, whole, sliced)
    if options.json:
        print(json.dumps(_record(question, settings, {"whole": whole, "micro-batch 1": sliced}, found)))
        return
    print(", ".join(f"{name} {value}" for name, value in facts(settings.device).items()))
    _print_slicing(f"Batch of {settings.batch} as a whole", whole)
    _print_slicing("The same batch in micro-batches of 1", sliced)
    print_answer(found)


def settings_parser(**defaults: object) -> argparse.ArgumentParser:
    """Arguments of every benchmark here."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="minilm", help="random weights, but for minilm")
    parser.add_argument("--bits", type=int, choices=(0, 4), default=0, help="4: frozen matrices in nf4")
    parser.add_argument("--batch", type=int, default=8, help="examples")
    parser.add_argument("--length", type=int, default=128, help="tokens of each example")
    parser.add_argument("--directions", type=int, default=1, help="K")
    parser.add_argument("--units", choices=UNITS, default="all", help="what is trained, beside the head")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or meta: memory without computing")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the frozen weights")
    parser.add_argument("--task", choices=TASKS, default="classification")
    parser.add_argument("--layers", type=int, default=0, help="keep so many blocks of the model; 0: all")
    parser.add_argument("--workspace-kib", type=int, default=2048, help="temporaries of one operation")
    parser.add_argument("--json", action="store_true", help="one line with everything instead of tables")
    parser.set_defaults(**defaults)
    return parser


def settings_of(options: argparse.Namespace) -> Settings:
    """The part of the arguments that says what is measured."""
    return Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})


def _parser() -> argparse.ArgumentParser:
    parser = settings_parser()
    parser.add_argument("--rounds", type=int, default=5, help="steps timed of each variant, taking turns; 0: no times")
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument("--threads", type=int, default=0, help="of the timed steps; 0: PyTorch's choice")
    parser.add_argument("--settle-allocator", action="store_true", help="glibc gives tensors pages of their own")
    return parser


def _question(settings: Settings) -> str:
    what = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(settings).items())
    return f"What does one step cost, in time and memory, and does ours reach its targets? ({what})"


def _measure(settings: Settings, micro_batch: int, options: argparse.Namespace) -> Slicing:
    rows = variants(settings)
    found = {}
    if not options.no_memory:
        found = {name: memory(settings, name, micro_batch, options.settle_allocator) for name in rows}
    seconds: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    if options.rounds and settings.device != "meta":
        work = prepare(settings)
        runs = {name: work.run(row, micro_batch) for name, row in rows.items()}
        seconds, errors = times(runs, options.rounds, settings.device)
    return Slicing(seconds, errors, found)


def _record(question: str, settings: Settings, slicings: dict[str, Slicing], found: list[Verdict]) -> dict[str, object]:
    return {
        "question": question,
        "settings": dataclasses.asdict(settings),
        "facts": facts(settings.device),
        "figures": {name: dataclasses.asdict(slicing) for name, slicing in slicings.items()},
        "answer": [dataclasses.asdict(verdict) for verdict in found],
    }


def _print_slicing(title: str, slicing: Slicing) -> None:
    print_table(title, [COLUMNS] + [_row(name, slicing) for name in {**slicing.memory, **slicing.seconds}])
    for name in {**slicing.memory, **slicing.errors}:
        reasons = {slicing.errors.get(name, ""), slicing.memory[name].error if name in slicing.memory else ""} - {""}
        for reason in sorted(reasons):
            print(f"  {name}: {reason}")


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns; the first row is the head."""
    print(f"\n{title}".rstrip())
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        print(
            name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)), sep="  "
        )


def _row(name: str, slicing: Slicing) -> tuple[str, ...]:
    seconds, figure = slicing.seconds.get(name), slicing.memory.get(name)
    ratios = [slicing.time(name, to) if seconds and to in slicing.seconds else None for to in (BACKPROP, INFERENCE)]
    activations = figure.activations if figure else None
    total = activations + figure.weights if figure and activations is not None else None
    numbers = [
        (statistics.median(seconds) * 1e3 if seconds else None, ".1f"),
        *((value, ".2f") for value in ratios),
        (activations, ".1f"),
        (total, ".0f"),
        (figure.resident if figure else None, ".1f"),
    ]
    return name, *("-" if value is None else format(value, form) for value, form in numbers)


def print_answer(found: Sequence[Verdict]) -> None:
    """The last line of a benchmark."""
    lines = [
        f"{verdict.name}: {'not measured' if verdict.reached is None else f'{verdict.reached:.2f}'} "
        f"(target {verdict.target}{'' if verdict.reached is None else ', met' if verdict.met else ', NOT MET'})"
        for verdict in found
    ]
    print("\nAnswer: " + ("; ".join(lines) or "no target is about these settings") + ".")


if __name__ == "__main__":
    main()
