"""The boxes of a simulated fleet: how many there are of each size, how slow they are, and budgets that are to a small
model what their memories are to a large one. No step is run here, they are predicted.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.plan import Plan
from spry_app.client.device import device_of
from spry_app.client.node import load_node
from spry_app.config import RunConfig, Scalar
from spry_app.data import label_names
from spry_app.errors import SpryError
from spry_app.methods import Layout, StepMemory, get_method
from spry_app.models import load_model
from spry_app.server.held_out import held_out
from spry_app.server.memory import MARGIN, step_memory
from spry_app.tasks import get_task

EXACT, SLOPES = "checkpointed-backprop", "forward-mode"
ROOM = 1.5
"""What a strong box has, of what checkpointed backprop takes on all units."""


@dataclass(frozen=True)
class Box:
    """gib: of memory. count: of the nodes. slowness: how many times as long a pass takes as on the fastest. budget_mib:
    what a step may take there of a small model, in the place of all that memory.
    """

    gib: float
    count: int
    slowness: float
    budget_mib: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.gib:g} GB"


@dataclass(frozen=True)
class Fleet:
    """boxes: in the order of partitions. forward_ms: of the fastest. steps: the smallest, MiB."""

    boxes: tuple[Box, ...]
    forward_ms: float
    steps: Mapping[str, float]

    @property
    def each(self) -> list[Box]:
        """Of every partition."""
        return [box for box in self.boxes for _ in range(box.count)]

    def own(self) -> list[dict[str, Scalar]]:
        """Node config of each, as a real one would state it."""
        return [
            {"memory-budget-mib": box.budget_mib, "forward-ms": round(box.slowness * self.forward_ms, 3)}
            for box in self.each
        ]


def budgets(mib: StepMemory, half: int) -> list[float]:
    """Of a large, a middle and a small box, from what the smallest steps take. half: the block at which the upper half
    of the units begins.

    The large one holds checkpointed backprop on all units, with room; that in the middle, as the server is sure, on the
    upper half of them, and really not on all; the small one on less than that, and forward mode on all: each in the
    middle between the two. Raises SpryError for a model on which there is no such place.
    """
    whole, upper, slopes = mib(EXACT, 0) / MARGIN, mib(EXACT, half), mib(SLOPES, 0)
    if not slopes < upper < whole:
        raise SpryError(
            f"No budget lies between forward mode on all units ({slopes:.3f} MiB), checkpointed backprop on the upper "
            f"half ({upper:.3f}) and on all ({whole:.3f}) on this model: say which to use with --budgets."
        )
    return [float(f"{value:.4g}") for value in (ROOM * whole, (upper + whole) / 2, (slopes + upper) / 2)]


def smallest(plan: Plan, keys: Mapping[str, Scalar]) -> tuple[StepMemory, int]:
    """What the server of a run with these keys deals units out by, and where the upper half of the units begins."""
    config = RunConfig.from_flower(plan.final(keys, 0))
    task, labels = get_task(config.data), len(label_names(config.data))
    adapted = load_model(config.model, config.adapter, labels, config.seed, task=task)
    method = get_method(config).on(Layout(adapted.depths(), len(adapted.blocks)), config.client)
    rows = held_out(config, adapted)
    if rows is None:
        raise SpryError("Steps are predicted on rows of data.test, and there are none.")
    depths = sorted(adapted.depth(names) for unit, names in adapted.units.items() if unit != "head")
    return step_memory(adapted, rows, config, method), depths[len(depths) // 2]


def forward_ms(plan: Plan, keys: Mapping[str, Scalar]) -> float:
    """Of a node that states nothing, measured here as a node measures it."""
    config = RunConfig.from_flower(plan.final(keys, 0))
    node = load_node(config, {"partition-id": 0, "num-partitions": plan.nodes})
    return round(device_of(node, config).forward_ms or 0.0, 3)


def fleet(
    plan: Plan,
    keys: Mapping[str, Scalar],
    head_alone: Mapping[str, Scalar],
    sizes: Sequence[Box],
    given: Sequence[float],
    kept: Path,
) -> Fleet:
    """keys: of the run that deals by device. head_alone: of one without an adapter, whose passes are timed. given:
    budgets; none for `budgets`. kept: file of what was measured, so that the same command means the same runs.
    """
    mib, half = smallest(plan, keys)
    steps = {
        f"{kind}, {what}": round(mib(kind, depth) / MARGIN, 3)
        for kind in (EXACT, SLOPES, "central-difference")
        for what, depth in (("all units", 0), ("upper half", half))
    }
    told = json.loads(kept.read_text()) if kept.exists() else forward_ms(plan, head_alone)
    kept.write_text(json.dumps(told) + "\n")
    found = list(given) or budgets(mib, half)
    if len(found) != len(sizes):
        raise SpryError(f"--budgets has {len(found)} numbers; it must have {len(sizes)}, one for each size of box.")
    boxes = (dataclasses.replace(box, budget_mib=budget) for box, budget in zip(sizes, found, strict=True))
    return Fleet(tuple(boxes), told, steps)
