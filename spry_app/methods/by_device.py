"""Who trains which units with which gradient, by what each node's memory holds, and how much of the work, by how fast
it is. Measures nothing: a Deal tells.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable

from spry_app.autodiff.gradients import GRADIENTS
from spry_app.methods.assignment import Deal, Share, depth_split
from spry_app.methods.pace import in_time

EXACT = ("backprop", "checkpointed-backprop", "bisected-backprop")
"""The exact kinds, the fastest first, which takes the most memory."""
SLOPES = ("forward-mode", "central-difference")
"""Those of a weak one, where the method's own has no slopes."""
LARGE = 0.5
"""Part of the units, from the top, that a node must hold with an exact gradient to be a strong one."""


def by_device(deal: Deal) -> list[Share]:
    """Exact gradients where memory holds them, slopes on a band of upper units elsewhere.

    A node is strong whose memory holds a step of an exact gradient on the upper half of the units or more: it takes it
    on all that it reaches, with the kind that reaches furthest. The others take bands, as `depth_split` deals them, of
    what they reach; of the upper half alone where strong nodes hold the rest. A band on which an exact gradient fits
    has one, else the method's own, made of slopes, or one that takes less where memory holds none of its steps (two
    plain forward passes, no tangents). A unit that is out of everyone's reach goes to the node with the most memory. A
    node that has stated no memory has stated no limit. Those that are much slower than the others do less (`in_time`).
    """
    shares: dict[int, Share] = {}
    weak = []
    for client in range(deal.clients):
        kind, reach = _exact(deal, client)
        if kind and deal.units and len(reach) >= LARGE * len(deal.units):
            shares[client] = _share(deal, reach, kind)
        else:
            weak.append(client)
    if weak:
        shares |= zip(weak, _bands(deal, weak, held={unit for share in shares.values() for unit in share}), strict=True)
    found = [shares[client] for client in range(deal.clients)]
    return in_time(deal, _covering(deal, found))


def _bands(deal: Deal, weak: list[int], held: set[str]) -> list[Share]:
    """Of the clients that are not strong, in their order. held: what the strong ones have."""
    upper = deal.units[len(deal.units) // 2 :]
    lower_is_held = held.issuperset(deal.units[: len(deal.units) // 2])
    reaches = [_reach(deal, client, _slopes(deal, client)) for client in weak]
    reached = set().union(*reaches) & set(upper if lower_is_held else deal.units) or set(deal.units[-1:])
    kept = [index for index, unit in enumerate(deal.units) if unit in reached]
    dealt = depth_split(
        dataclasses.replace(
            deal,
            units=tuple(deal.units[index] for index in kept),
            depths=tuple(deal.depths[index] for index in kept),
            sizes=tuple(deal.sizes[index] for index in kept),
            memory_mib=tuple(deal.memory_mib[client] for client in weak),
        )
    )
    found = []
    for client, hand, reach in zip(weak, dealt, reaches, strict=True):
        units = [unit for unit in hand if unit in reach] or list(deal.units[-1:])
        exact, _ = _exact(deal, client, units)
        found.append(_share(deal, units, exact or _slopes(deal, client)))
    return found


def _covering(deal: Deal, shares: list[Share]) -> list[Share]:
    """With the units that nobody has, which take slopes, as the memory for them is short."""
    missing = [unit for unit in deal.units if not any(unit in share for share in shares)]
    if missing and shares:
        most = max(range(deal.clients), key=lambda client: deal.memory_mib[client] or math.inf)
        units = {*missing, *shares[most]}
        shares[most] = _share(deal, units, _slopes(deal, most, units))
    return shares


def _share(deal: Deal, units: Iterable[str], kind: str) -> Share:
    held = set(units)
    own = "" if kind == deal.gradient else kind
    return Share([unit for unit in deal.units if unit in held], own, 0 if GRADIENTS[kind].slopes else 1)


def _exact(deal: Deal, client: int, units: Collection[str] = ()) -> tuple[str, tuple[str, ...]]:
    """The exact kind that the client is to take on `units`, or on the most that it can reach, and what it reaches with
    it: the fastest of several; "" where there is none. Who has stated no memory is not asked for the fastest of all.
    """
    known = [kind for kind in EXACT if _first([kind], deal, client)]
    if not deal.memory_mib[client]:
        known = [kind for kind in known if kind != EXACT[0]] or known
    reaches = {kind: _reach(deal, client, kind) for kind in known}
    able = [kind for kind in known if set(units) <= set(reaches[kind])]
    best = max(able, key=lambda kind: 0 if units else len(reaches[kind]), default="")
    return best, reaches.get(best, ())


def _first(kinds: Iterable[str], deal: Deal, client: int) -> str:
    """Of those that the client can take; empty where it can take none."""
    known = deal.gradients[client] if deal.gradients else (deal.gradient,)
    return next((kind for kind in kinds if kind in known), "")


def _slopes(deal: Deal, client: int, units: Collection[str] = ()) -> str:
    """The first kind of slopes that the client can take and whose step fits on a unit, or on all of `units`; where none
    does, the first.
    """
    own = [deal.gradient] if GRADIENTS[deal.gradient].slopes else []
    known = [kind for kind in (*own, *SLOPES) if _first([kind], deal, client)]
    fitting = (kind for kind in known if (reach := _reach(deal, client, kind)) and set(units) <= set(reach))
    return next(fitting, known[0] if known else deal.gradient)


def _reach(deal: Deal, client: int, kind: str) -> tuple[str, ...]:
    """The units, from the top down, on which a step fits."""
    memory = deal.memory_mib[client] or math.inf
    if memory == math.inf:
        return deal.units
    lowest = min((depth for depth in set(deal.depths) if deal.step_mib(kind, depth) <= memory), default=math.inf)
    return tuple(unit for unit, depth in zip(deal.units, deal.depths, strict=True) if depth >= lowest)
