"""How much of a round's work is left to a client that is slower than the others. Measures nothing: a Deal tells."""

import statistics
from collections.abc import Sequence

from spry_app.autodiff.costs import suffix_above
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.methods.assignment import Deal, Share

SLACK = 1.5
"""A client that takes at most so many times as long as the others is left as it is: times are measured on machines that
do other things too, and those of equal ones must not change what is learned."""


def in_time(deal: Deal, shares: Sequence[Share]) -> list[Share]:
    """The shares, with fewer local steps where they would end long after the others, and then fewer directions.

    A share takes the client's time for a forward pass, by the passes of a step (all steps have as many examples), by
    its steps. It is too long where that is SLACK times the round's median, the lower one of two: nobody waits for a few
    slow clients, a fast one does not leave the others without work, and one that lies about its speed moves nothing.
    Then it gets as many steps as take no longer than the median, and one that is too long by itself as many directions;
    of either one at least. A client that has stated no speed keeps all. Nobody gets more than is set.

    Steps go first. With d numbers perturbed, S steps along K directions have a variance of about d / (S K), whichever
    of the two is less; but directions share the passes of a step (n cost 1 + n), so at the same cost fewer steps are
    made of more directions, or of as many. What fewer steps have less of beside, examples, adds little to noise that is
    d / K of the signal. And an exact gradient has steps alone.
    """
    times = [_step_ms(deal, client, share) * _steps(deal, client) for client, share in enumerate(shares)]
    stated = [time for time in times if time]
    if not stated:
        return list(shares)
    until = statistics.median_low(stated)
    return [
        _cut(deal, client, share, until) if time > SLACK * until else share
        for client, (share, time) in enumerate(zip(shares, times, strict=True))
    ]


def _cut(deal: Deal, client: int, share: Share, until: float) -> Share:
    steps = max(1, int(until / _step_ms(deal, client, share)))
    most = directions = _directions(deal, share)
    while steps == 1 and directions > 1 and _step_ms(deal, client, share, directions) > until:
        directions -= 1
    return Share(share, share.gradient, directions if directions < most else share.directions, steps)


def _step_ms(deal: Deal, client: int, share: Share, directions: int = 0) -> float:
    """Of one example's part in a step, along all directions of the share or so many; 0.0 where it cannot be known."""
    if not (deal.forward_ms and deal.steps and share):
        return 0.0
    depth = dict(zip(deal.units, deal.depths, strict=True))
    suffix = suffix_above(min(depth[unit] for unit in share), deal.blocks)
    count = directions or _directions(deal, share)
    cost = GRADIENTS[share.gradient or deal.gradient].cost(count, min(count, deal.directions_at_once))
    return deal.forward_ms[client] * cost.forwards(suffix)


def _directions(deal: Deal, share: Share) -> int:
    exact = GRADIENTS[share.gradient or deal.gradient].slopes is None
    return 1 if exact else min(share.directions or deal.directions, deal.directions)


def _steps(deal: Deal, client: int) -> int:
    return deal.steps[client] if deal.steps else 0
