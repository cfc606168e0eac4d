"""How a step is cut into slices so that it fits into a given memory. Runs no step itself: it is told what one takes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from spry_app.autodiff.workspace import DEFAULT_BYTES


@dataclass(frozen=True)
class Slices:
    """What passes through the model at once. The slopes are the same for any sizes, but for rounding.

    micro_batch: examples; directions_at_once: directions that share a pass; workspace_bytes: temporaries of one
    operation (attention scores, logits over a vocabulary).
    """

    micro_batch: int
    directions_at_once: int
    workspace_bytes: int = DEFAULT_BYTES


class DoesNotFit(ValueError):
    """The smallest slices take more than the budget; `least_mib` is what they take."""

    def __init__(self, least_mib: float) -> None:
        super().__init__(f"the smallest step takes {least_mib:.1f} MiB")
        self.least_mib = least_mib


WORKSPACES = tuple(DEFAULT_BYTES // 4**halving for halving in range(4))
"""Small temporaries mean many small operations, so they are the last thing to give."""
SMALLEST = Slices(1, 1, min(WORKSPACES))


def halved(slices: Slices) -> Slices:
    """What takes less: half the examples; where it is one, half the directions; then smaller temporaries."""
    if slices.micro_batch > 1:
        return replace(slices, micro_batch=slices.micro_batch // 2)
    if slices.directions_at_once > 1:
        return replace(slices, directions_at_once=slices.directions_at_once // 2)
    return replace(slices, workspace_bytes=max(slices.workspace_bytes // 4, SMALLEST.workspace_bytes))


def fit(peak_mib: Callable[[Slices], float], batch: int, directions: int, budget_mib: float) -> Slices:
    """The fastest slices found that stay within the budget, by a handful of trials. Raises DoesNotFit.

    `peak_mib` runs a step on the worst examples in the slices it is given, and must grow with each of them; infinite
    where there was no memory to finish it. Directions that share a pass save most (n cost 1 + n passes), so they come
    before larger micro-batches.
    """
    least = math.inf
    for workspace_bytes in WORKSPACES:
        least = peak_mib(Slices(1, 1, workspace_bytes))
        if least <= budget_mib:
            break
    else:
        raise DoesNotFit(least)

    most = _largest(lambda n: peak_mib(Slices(1, n, workspace_bytes)), least, directions, budget_mib)
    at_once = math.ceil(directions / math.ceil(directions / most))  # chunks of one size take no more passes
    alone = least if at_once == 1 else peak_mib(Slices(1, at_once, workspace_bytes))
    examples = _largest(lambda n: peak_mib(Slices(n, at_once, workspace_bytes)), alone, batch, budget_mib)
    return Slices(examples, at_once, workspace_bytes)


def _largest(peak: Callable[[int], float], one: float, most: int, budget: float) -> int:
    """The largest n up to `most` with peak(n) <= budget, or one not far below it; peak(1) is `one`, and fits.

    Memory is close to linear in n, so each trial is where the line through the last two ends meets the budget.
    """
    fits, takes = 1, one
    if most == 1:
        return 1
    fails, would = most, peak(most)
    if would <= budget:
        return most
    while fails - fits > max(1, fits // 8):
        part = 0.5 if would == math.inf else (budget - takes) / max(would - takes, 1e-9)
        guess = fits + math.floor((fails - fits) * part)
        trial = min(max(guess, fits + 1), fails - 1)
        memory = peak(trial)
        if memory <= budget:
            fits, takes = trial, memory
        else:
            fails, would = trial, memory
    return fits
