"""The noise of a round as the server meets it: what its clients perturb, and a line of numbers. The formulas are in
methods.noise.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from spry_app.autodiff.directions import Tensors
from spry_app.config import RunConfig
from spry_app.methods import Method
from spry_app.methods.global_state import GlobalState
from spry_app.methods.noise import (
    MOSTLY_NOISE,
    Hand,
    Noise,
    Weigh,
    expected_cosines,
    measured_noise,
    overall,
    warning,
)
from spry_app.protocol import Task


def hands_of(state: GlobalState, method: Method, clients: Iterable[tuple[Sequence[str], int, int, str]]) -> list[Hand]:
    """What clients perturb, of each its units, directions, examples and gradient (as Method.taking); nothing where all
    gradients are exact.

    Those who share their directions count as one.
    """
    hands = [state.hand(*client) for client in clients]
    if not any(hand.dimensions for hand in hands):
        return []
    if method.seeds == "own":
        return hands
    alike = {hand.units: hand for hand in hands}
    return list(alike.values())


def too_noisy(config: RunConfig, state: GlobalState, method: Method, tasks: Iterable[Task]) -> str:
    """A sentence where what these tasks will give is mostly noise, or short of `noise.target-cosine`; else empty."""
    hands = hands_of(state, method, ((task.units, task.directions, 1, task.gradient) for task in tasks))
    return warning(hands, method.directions, max(MOSTLY_NOISE, config.noise.target_cosine))


def noise_of(
    state: GlobalState,
    method: Method,
    units: Mapping[str, Sequence[str]],
    changes: Sequence[tuple[Tensors, float]],
    hands: Sequence[Hand],
    weigh: Weigh | None = None,
    exact: Collection[int] = (),
) -> dict[str, Any] | None:
    """For a line of metrics.jsonl: of each unit, and of all together that no head with an exact gradient is. None where
    nothing can be said.

    changes: how each client changed its tensors, and its examples. hands: what they perturbed. weigh, exact: as
    measured_noise.
    """
    apart = state.exact if method.directions == "orthogonal" and hands else None
    found = measured_noise(changes, units, expected_cosines(hands, method.directions), apart, weigh, exact)
    total = overall(noise for unit, noise in found.items() if not state.exact.issuperset(units[unit]))
    if not found:
        return None
    of_units = {unit: {"estimates": noise.estimates, **_numbers(noise)} for unit, noise in found.items()}
    return {**(_numbers(total) if total else {}), "units": of_units}


def _numbers(noise: Noise) -> dict[str, float | None]:
    ratio = noise.signal_to_noise
    return {
        "signal-to-noise": float(f"{ratio:.4g}") if math.isfinite(ratio) else None,
        "cosine": float(f"{noise.cosine:.4g}"),
    }
