"""Who trains which units. Pure functions of a Deal: units, what clients can bear, round. Nothing here trains."""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from spry_app.autodiff.costs import suffix_above
from spry_app.autodiff.gradients import GRADIENTS

StepMemory = Callable[[str, int], float]
"""(name of a gradient, lowest block) -> MiB above the loaded model of the smallest step on the units from there up."""


def _unknown(gradient: str, lowest: int) -> float:
    """Where nobody has measured, every step fits."""
    return 0.0


class Pace(NamedTuple):
    """Of a client. forward_ms: how long a forward pass of one example takes; 0.0 where it has not said. rows: that it
    trains on.
    """

    forward_ms: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class Deal:
    """What is dealt out in one round, and to whom.

    units: names, from the bottom of the model to its top. depths: the block of each unit, 0 for the lowest, `blocks`
    for what lies above all of them. sizes: trainable values of each unit. blocks: how many the model has.
    memory_mib: for each client, what a training step may take; 0.0 where it has not said. round: from 1. gradient: the
    method's. gradients: for each client, those that it can take; empty as a whole for that one alone. step_mib:
    (gradient, lowest block) -> what the smallest step takes on the units from there up, MiB. forward_ms: for each
    client, how long a forward pass of one example takes; 0.0 where it has not said, empty where nobody has. steps: for
    each client, the local steps of all its work. directions, directions_at_once: of a step, as they are set.
    """

    units: tuple[str, ...]
    depths: tuple[int, ...]
    sizes: tuple[int, ...]
    blocks: int
    memory_mib: tuple[float, ...]
    round: int
    gradient: str = "forward-mode"
    gradients: tuple[tuple[str, ...], ...] = ()
    step_mib: StepMemory = _unknown
    forward_ms: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    directions: int = 1
    directions_at_once: int = 1

    @property
    def clients(self) -> int:
        """How many clients take part."""
        return len(self.memory_mib)


class Share(list[str]):
    """The units of a client, which may take another gradient for them than the method's, and do less.

    gradient: a name of GRADIENTS; "" for the method's. directions: at most so many a batch, steps: at most so many
    local ones; each 0 for as many as are set.
    """

    def __init__(self, units: Iterable[str], gradient: str = "", directions: int = 0, steps: int = 0) -> None:
        super().__init__(units)
        self.gradient, self.directions, self.steps = gradient, directions, steps

    @classmethod
    def of(cls, hand: Sequence[str], beside: Sequence[str] = ()) -> Self:
        """What an Assign has dealt out, with units that go to everyone."""
        units = [*hand, *beside]
        return cls(units, hand.gradient, hand.directions, hand.steps) if isinstance(hand, Share) else cls(units)


Assign = Callable[[Deal], Sequence[Sequence[str]]]
"""Deal -> the units of each client, or its Share."""


def every_unit(deal: Deal) -> list[list[str]]:
    """Every client trains everything."""
    return [list(deal.units) for _ in range(deal.clients)]


def cyclic_split(deal: Deal) -> list[list[str]]:
    """Deal the units out like cards, starting one client further each round (SPRY, arXiv:2405.15551, Algorithm 1).

    With fewer units than clients the dealing goes round again, so several clients hold the same unit. Every unit is
    held by a client; hands differ in size by one at most, and so do the numbers of holders of the units.
    """
    hands: list[list[str]] = [[] for _ in range(deal.clients)]
    if deal.units:
        for turn in range(max(len(deal.units), deal.clients)):
            hands[(turn + deal.round) % deal.clients].append(deal.units[turn % len(deal.units)])
    return hands


def depth_split(deal: Deal) -> list[list[str]]:
    """A band of neighbouring units for each client: the lower its memory, the higher its band.

    Tangents exist only above the lowest unit a client holds, so its cost is a matter of depth (`forward_passes`).
    Bands hold about the same number of trainable values, on which the variance of a forward gradient depends. With
    fewer units than clients, neighbours in strength hold the same unit; numbers of holders differ by one at most.
    Clients of equal memory change places with the round: over as many rounds as there are of them, they pay alike.
    A client that has stated no memory has stated no limit, and ranks with the strongest.
    """
    if not deal.units:
        return [[] for _ in range(deal.clients)]
    bands = _bands(deal.sizes, min(len(deal.units), deal.clients))
    return [list(deal.units[bands[place * len(bands) // deal.clients]]) for place in _places(deal)]


def forward_passes(hand: Collection[str], deal: Deal, directions: int) -> float:
    """Cost of one step of forward mode on a hand, all directions in one pass, in passes through the whole model.

    Below the lowest unit there is no tangent (autodiff.costs.Cost).
    """
    depth = dict(zip(deal.units, deal.depths, strict=True))
    lowest = min((depth[unit] for unit in hand), default=deal.blocks)
    return GRADIENTS["forward-mode"].cost(directions, directions).forwards(suffix_above(lowest, deal.blocks))


def _places(deal: Deal) -> list[int]:
    """Place of each client, 0 at the bottom: most memory first; among equals one further each round."""
    strength = [memory or math.inf for memory in deal.memory_mib]
    places = [0] * deal.clients
    first = 0
    ranked = sorted(range(deal.clients), key=lambda client: -strength[client])
    for _, group in itertools.groupby(ranked, key=lambda client: strength[client]):
        equals = list(group)
        for turn, client in enumerate(equals):
            places[client] = first + (turn + deal.round) % len(equals)
        first += len(equals)
    return places


def _bands(sizes: Sequence[int], count: int) -> list[slice]:
    """Cut a row of units into `count` bands, none empty, with the least sum of squared sizes.

    Dynamic programming over the end of each band. Where cuts are equally good the upper bands get fewer units: those
    below them then start, and cost, no deeper than they must.
    """
    below = np.concatenate([[0], np.cumsum(sizes)]).astype(np.float64)
    starts, ends = np.ogrid[: len(below), : len(below)]
    square = np.where(starts < ends, (below[ends] - below[starts]) ** 2, np.inf)
    best, cuts = square[0], []
    for _ in range(count - 1):
        total = best[:, None] + square
        cuts.append(len(sizes) - total[::-1].argmin(axis=0))  # the last of the best starts
        best = total.min(axis=0)
    bands, end = [], len(sizes)
    for cut in reversed(cuts):
        bands.append(slice(int(cut[end]), end))
        end = bands[-1].start
    return [slice(0, end), *reversed(bands)]
