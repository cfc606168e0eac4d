"""What rounds of the Gaussian mechanism cost in (epsilon, delta). Adds no noise, and sees no data."""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spry_app.errors import SpryError

ORDERS = (*range(2, 33), 40, 48, 64, 96, 128)
"""Of the Renyi divergence; whole ones, for which the bound on sampled rounds is stated."""


@dataclass(frozen=True)
class Release:
    """A round: `clients` drawn from `population` without replacement, secretly, each as likely; as many of both where
    who takes part is known, or all do. times: mechanisms that each then takes part in, one after the other.
    """

    population: int
    clients: int
    times: int = 1


def accounting() -> Any:
    """Google's `dp_accounting`. Raises SpryError where it is not installed."""
    try:
        import dp_accounting
    except ImportError:
        raise SpryError(
            "privacy.mode needs the accountant dp-accounting, which is not installed on the server: pip install "
            "'spry[privacy]' (or 'dp-accounting>=0.6,<0.7')."
        ) from None
    return dp_accounting


def epsilon(releases: Sequence[Release], multiplier: float, delta: float) -> float:
    """Of all of them together, for two data sets of which one has another client (or example) in the place of one.

    multiplier: standard deviation of the noise over the sensitivity, which for that relation is twice the bound on one
    of them. The lesser of two upper bounds: T rounds as if everybody took part in all, which are one Gaussian mechanism
    of multiplier / sqrt(T), exactly (arXiv:1805.06530, theorem 8); and by Renyi divergence, with what secret sampling
    gives (arXiv:1808.00087, theorem 27).
    """
    rounds = sum(release.times for release in releases)
    if not rounds:
        return 0.0
    dp = accounting()
    exact = float(dp.get_epsilon_gaussian(multiplier / math.sqrt(rounds), delta))
    if all(release.clients == release.population for release in releases):
        return exact
    total = np.zeros(len(ORDERS))
    for release, count in Counter(releases).items():
        total += count * release.times * _renyi(release, multiplier)
    sampled, _ = dp.rdp.compute_epsilon(ORDERS, total, delta)
    return min(exact, float(sampled))


@functools.lru_cache(maxsize=256)
def _renyi(release: Release, multiplier: float) -> NDArray[np.float64]:
    """The divergence at ORDERS of one mechanism of the round; kept, as one takes a second.

    `dp_accounting` takes the multiplier of its events as one over the sensitivity, without a factor for the relation.
    """
    dp = accounting()
    accountant = dp.rdp.RdpAccountant(ORDERS, dp.NeighboringRelation.REPLACE_ONE)
    event = dp.GaussianDpEvent(multiplier)
    if release.clients < release.population:
        event = dp.SampledWithoutReplacementDpEvent(release.population, release.clients, event)
    accountant.compose(event)
    return np.array(accountant._rdp)  # has no public way out but epsilon
