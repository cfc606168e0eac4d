"""What nodes say of their machines and of what they can take, in words and as values to keep. Decides nothing."""

import statistics
from collections import Counter
from collections.abc import Collection
from typing import Any

from spry_app.protocol import Introduction

_MOST_NAMED = 3
"""Accelerators in a sentence, the most frequent ones."""


def kept(said: Introduction) -> dict[str, Any]:
    """For run.json; only what was stated."""
    memory = {"memory-mib": said.memory_mib}
    return {**memory, "gradients": list(said.gradients), **said.device.stated()}


def sentence(met: Collection[Introduction]) -> str:
    """Of some nodes together."""
    times = sorted(said.device.forward_ms for said in met if said.device.forward_ms is not None)
    budgets = sorted(said.memory_mib for said in met if said.memory_mib)
    kinds = Counter(kind for said in met for kind in said.gradients)
    names = Counter(said.device.accelerator for said in met if said.device.accelerator).most_common(_MOST_NAMED)
    on_battery = sum(said.device.plugged is False for said in met)
    parts = [
        f"a forward pass of an example in {times[0]:.3g} to {times[-1]:.3g} ms, median {statistics.median(times):.3g}"
        if times
        else "",
        f"{budgets[0]:g} to {budgets[-1]:g} MiB a step on the {len(budgets)} that have a budget" if budgets else "",
        "gradients: " + ", ".join(f"{kind} on {count}" for kind, count in kinds.items()) if kinds else "",
        "; ".join(f"{count} x {name}" for name, count in names),
        f"{on_battery} on battery" if on_battery else "",
    ]
    return f"{len(met)} nodes can be used. " + "; ".join(part for part in parts if part)
