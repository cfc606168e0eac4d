"""How much of a mean gradient is noise: expected from dimensions and directions, and measured across clients. Pure
numbers; nothing here steps, sends or writes.
"""

import dataclasses
import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spry_app.autodiff.directions import Tensors

MOSTLY_NOISE = 0.1
"""Expected cosine with its own true gradient below which a mean estimate is mostly noise and deserves a warning."""

_ROUNDING = 1e-9

RELATIVE_NOISE: dict[str, Callable[[float, float], float]] = {
    "gaussian": lambda d, n: (d + 1) / n,
    "orthogonal": lambda d, n: max(0.0, d / n - 1),
}
"""Kind of directions -> (d, n) -> E|estimate - gradient|^2 / |gradient|^2 of the mean of n slopes * directions.

Gaussian: E (v.g)^2 |v|^2 = (d + 2) |g|^2 for v ~ N(0, I) in d dimensions, so one direction has (d + 1) |g|^2 of noise,
and n independent ones an n-th of it. Orthogonal: n directions of length sqrt(d) give d / n times the projection on
their span, which holds n / d of |g|^2; nothing is left at n = d.
"""


def relative_noise(dimensions: int, directions: float, kind: str) -> float:
    """Of RELATIVE_NOISE; none where nothing is perturbed, as with an exact gradient."""
    return RELATIVE_NOISE[kind](dimensions, directions) if dimensions else 0.0


def _cosine(relative_noise: float) -> float:
    return 1 / math.sqrt(1 + relative_noise)


@dataclass(frozen=True)
class Hand:
    """What one client perturbs together: units, d = `dimensions` numbers in them (0 where its gradient is exact), K =
    `directions`, and the examples by which its estimate is weighted, or what takes their place.
    """

    units: tuple[str, ...]
    dimensions: int
    directions: int
    examples: float = 1


def expected_cosines(hands: Sequence[Hand], kind: str = "gaussian") -> dict[str, float]:
    """Unit -> expected cosine of its mean estimate over the clients that hold it with its own true gradient.

    E[estimate . gradient] / sqrt(E|estimate|^2 |gradient|^2): for d numbers that are perturbed together along n
    directions in all (K times the clients that hold the same units), Gaussian sqrt(n / (d + n + 1)), orthogonal
    sqrt(min(1, n / d)).
    Unequal hands: the part w of each client in the mean makes n = 1 / sum(w^2 / K) directions of those with the same
    units (who share one frame, where directions are orthogonal); groups with other units add their noise, an exact
    gradient adds none. All numbers of a hand are taken to carry the same part of its gradient. A unit that nobody
    perturbs is left out.
    """
    return {unit: _of_unit([hand for hand in hands if unit in hand.units], kind) for unit in _held(hands)}


def _held(hands: Iterable[Hand]) -> list[str]:
    return list(dict.fromkeys(unit for hand in hands if hand.dimensions for unit in hand.units))


def _of_unit(holders: Sequence[Hand], kind: str) -> float:
    total, noise = sum(hand.examples for hand in holders), 0.0
    for key in dict.fromkeys((hand.units, hand.dimensions) for hand in holders):
        alike = [hand for hand in holders if (hand.units, hand.dimensions) == key]
        examples = sum(hand.examples for hand in alike)
        directions = 1 / sum((hand.examples / examples) ** 2 / hand.directions for hand in alike)
        noise += (examples / total) ** 2 * relative_noise(alike[0].dimensions, directions, kind)
    return _cosine(noise)


def fewest_directions(hands: Sequence[Hand], kind: str, target: float, most: int) -> tuple[dict[str, int], bool]:
    """Unit -> the least K of its holders, at most `most`, with which its mean has an expected cosine of `target`; and
    whether all units reach it.

    hands: as `expected_cosines`; their own directions do not count. A client whose K is the greatest of its units'
    leaves none of them short.
    """

    @functools.cache
    def cosines(directions: int) -> dict[str, float]:
        return expected_cosines([dataclasses.replace(hand, directions=directions) for hand in hands], kind)

    def enough(unit: str) -> int:
        return 1 + bisect_left(range(1, most), True, key=lambda k: cosines(k)[unit] >= target - _ROUNDING)

    reached = all(cosine >= target - _ROUNDING for cosine in cosines(most).values())
    return {unit: enough(unit) for unit in cosines(most)}, reached


def warning(hands: Sequence[Hand], kind: str = "gaussian", least: float = MOSTLY_NOISE) -> str:
    """A sentence on the unit that is worst off in a round, where its expected cosine is below `least`; else empty."""
    cosines = expected_cosines(hands, kind)
    worst = min(cosines, key=lambda unit: cosines[unit], default="")
    if not worst or cosines[worst] >= least - _ROUNDING:
        return ""
    holders = [hand for hand in hands if worst in hand.units]
    most = max(holders, key=lambda hand: hand.dimensions / hand.directions)
    return (
        f"d={most.dimensions:,}, K={most.directions}, {len(holders)} of {len(hands)} clients a unit: expected cosine "
        f"{cosines[worst]:.2g}, below {least:g}; use fewer dimensions "
        '(preset="spry-core", or adapter.subspace), more directions (client.directions), or backprop '
        '(method="fedyogi", and where memory is short gradient="bisected-backprop").'
    )


@dataclass(frozen=True)
class Noise:
    """Of a mean change. estimates: independent ones that it was measured from; 1: taken from theory. signal: squared
    length of what they have in common, unbiased, so it may be negative. noise: mean squared length of what the mean has
    beside it.
    """

    estimates: int
    signal: float
    noise: float

    @property
    def signal_to_noise(self) -> float:
        return self.signal / self.noise if self.noise else math.inf

    @property
    def cosine(self) -> float:
        """With what would be left without noise."""
        whole = self.signal + self.noise
        return math.sqrt(max(0.0, self.signal) / whole) if whole > 0 else 0.0


Weigh = Callable[[str, int], tuple[float, float]]
"""(unit, which client) -> weight of its estimate in the mean, and that estimate's variance, relative to the others'."""


def measured_noise(
    changes: Sequence[tuple[Tensors, float]],
    units: Mapping[str, Sequence[str]],
    expected: Mapping[str, float],
    apart: Collection[str] | None = None,
    weigh: Weigh | None = None,
    exact: Collection[int] = (),
) -> dict[str, Noise]:
    """Unit -> noise of the mean of the clients' changes, weighted by examples or as `weigh` says.

    changes: of each client, the tensors that it changed and its examples. units: unit -> names of its tensors. apart:
    names of tensors in which clients are independent of one another though they hold the same tensors; None for all.
    In others those clients count as one estimate, for they have parts of one frame, or shared directions; but not the
    `exact` ones, which have no directions.

    With m >= 2 independent estimates x_i of weights w_i, sum(w) = 1, and variances v_i but for a common factor:
    noise = q / (p - q) sum w_i |x_i - mean|^2 where p = sum w_i v_i, q = sum w_i^2 v_i (which is s^2 / m for equal
    weights and variances), signal = |mean|^2 - noise, both unbiased for x_i of one mean. With one, the `expected`
    cosine of a unit divides |x|^2; a unit that has none is left out.
    """
    found = {}
    for unit, names in units.items():
        holders = [index for index, (change, _) in enumerate(changes) if change.keys() >= set(names)]
        independent = apart is None or set(names) <= set(apart)
        weights, variances, keys = [], [], []
        for index in holders:
            change, examples = changes[index]
            weight, variance = weigh(unit, index) if weigh else (examples, 1.0)
            weights.append(float(weight))
            variances.append(variance)
            keys.append(str(index) if independent or index in exact else _key(change, apart))
        estimates = [_flat(changes[index][0], names) for index in holders]
        noise = _noise(*_together(estimates, weights, variances, keys), expected.get(unit))
        if noise is not None:
            found[unit] = noise
    return found


def overall(of_units: Iterable[Noise]) -> Noise | None:
    """Of all those units together; None for none."""
    noises = list(of_units)
    if not noises:
        return None
    return Noise(min(n.estimates for n in noises), sum(n.signal for n in noises), sum(n.noise for n in noises))


def _key(change: Tensors, apart: Collection[str] | None) -> str:
    return " ".join(sorted(change.keys() - set(apart or ())))


def _flat(change: Tensors, names: Sequence[str]) -> Tensor:
    return torch.cat([change[name].flatten().double() for name in names])


def _together(
    estimates: Sequence[Tensor], weights: Sequence[float], variances: Sequence[float], keys: Sequence[str]
) -> tuple[list[Tensor], list[float], list[float]]:
    """Means of the estimates with the same key, what they weigh, and the mean of their variances."""
    groups = [[i for i, key in enumerate(keys) if key == group] for group in dict.fromkeys(keys)]
    weight = [sum(weights[i] for i in group) for group in groups]
    means, of_means = [], []
    for group, whole in zip(groups, weight, strict=True):
        means.append(torch.stack([estimates[i] * weights[i] for i in group]).sum(0) / whole)
        of_means.append(sum(weights[i] * variances[i] for i in group) / whole)
    return means, weight, of_means


def _noise(
    estimates: Sequence[Tensor], weights: Sequence[float], variances: Sequence[float], expected: float | None
) -> Noise | None:
    if not estimates:
        return None
    part = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    stack = torch.stack(list(estimates))
    mean = part @ stack
    length = float(mean.square().sum())
    if len(estimates) == 1:
        return None if expected is None else Noise(1, length * expected**2, length * (1 - expected**2))
    variance = torch.tensor(variances, dtype=torch.float64)
    p, q = float(part @ variance), float(part.square() @ variance)
    noise = q / (p - q) * float(part @ (stack - mean).square().sum(1))
    return Noise(len(estimates), length - noise, noise)
