"""What a large model would take on each box of a fleet: the shape of a published one, planned as `spry plan` does it,
without weights. Nothing is trained, so nothing is said of accuracy.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from benchmarks.boxes import Box
from benchmarks.models import LABELS, SHAPES
from spry_app.config import RunConfig, Scalar
from spry_app.planner.advice import advise
from spry_app.planner.blank import model_of
from spry_app.planner.plan import Asked, Desk, rows_of
from spry_app.planner.predict import Predictor
from spry_app.planner.rows import Row
from spry_app.planner.ways import AS_SET, ways

LARGE: dict[str, Mapping[str, Scalar]] = {
    "roberta-large": {"data.max-length": 128, "client.micro-batch": 0},
    "llama2-7b": {
        "data.max-length": 512,
        "client.micro-batch": 1,
        "model.quantization": "nf4",
        "model.dtype": "bfloat16",
    },
}
"""--shape -> its keys, beside those of all: a batch of 8, four directions, LoRA on all units."""
_ALL: Mapping[str, Scalar] = {"method": "spry", "assign": "every-unit", "client.directions": 4}
HEAD = ("", "way", "fits", "examples, directions at once", "MiB with the weights", "passes a step", "s a step")


@dataclass(frozen=True)
class Planned:
    """rows: of one box, one a way. taken: the place of the one that `spry plan` advises; None where nothing fits."""

    box: Box
    memory_mib: float
    rows: tuple[Row, ...]
    taken: int | None


def planned(shape: str, sizes: Sequence[Box], forward_ms: float, reserve_gib: float) -> Iterator[Planned]:
    """One a size of box. forward_ms: of the fastest. reserve_gib: what the process takes beside the model."""
    with tempfile.TemporaryDirectory(prefix="spry-shape-") as folder:
        AutoConfig.for_model(**SHAPES[shape]).save_pretrained(folder)
        config = RunConfig.from_flower(
            {**_ALL, **LARGE[shape], "model.name": str(Path(folder)), "data.num-labels": LABELS}
        )
        adapted = model_of(config)
        predictor = Predictor(adapted, host=True)
        for box in sizes:
            memory = 1024 * (box.gib - reserve_gib)
            desk = Desk(predictor, memory, box.slowness * forward_ms, 1, Asked(limits=False))
            found = tuple(
                row for row in rows_of(desk, ways(config, adapted, 1, ("all",))) if not row.gradient.startswith(AS_SET)
            )
            yield Planned(box, memory, found, advise(found, memory).row)


def lines(found: Planned) -> Iterator[tuple[str, ...]]:
    """Of a table with HEAD; the way that is advised is in bold."""
    for place, row in enumerate(found.rows):
        name = f"**{row.gradient}**" if place == found.taken else row.gradient
        at_once = f"{row.examples_at_once}" + (f", {row.directions_at_once}" if row.directions_at_once else "")
        seconds = "-" if row.step_s is None or not row.fits else f"{row.step_s:.1f}"
        yield (
            f"{found.box.name} ({found.memory_mib:,.0f} MiB free)" if not place else "",
            name,
            "yes" if row.fits else "no",
            at_once,
            f"{row.total_mib:,.0f}",
            f"{row.forwards:.0f}",
            seconds,
        )
