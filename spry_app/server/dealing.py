"""The units of each client of a round, by the split that a method has. The splits are in methods.assignment."""

import dataclasses
from collections.abc import Mapping, Sequence

from spry_app.autodiff.directions import Tensors
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import Deal, Method, Pace, Share, StepMemory
from spry_app.methods.replay import HEAD, steps_in_full
from spry_app.models.units import depths
from spry_app.protocol import Task


def asked_mib(task: Task, method: Method, units: Mapping[str, Sequence[str]], step_mib: StepMemory) -> float:
    """What the smallest step of a task takes, by `step_mib`. units: of the model."""
    depth, blocks = depths(units)
    lowest = min((depth[unit] for unit in task.units), default=blocks)
    return step_mib(task.gradient or method.gradient.name, lowest)


def deal_out(
    config: RunConfig,
    method: Method,
    units: Mapping[str, Sequence[str]],
    tensors: Tensors,
    memory_mib: Sequence[float],
    round_: int,
    gradients: Sequence[tuple[str, ...]] = (),
    step_mib: StepMemory | None = None,
    paces: Sequence[Pace] = (),
) -> list[Share]:
    """One hand of units a client: the method's split, and the head to everyone where it is shared.

    units: unit -> names of its `tensors`. memory_mib: what a training step may take on each client, 0.0 where it has
    not said. gradients: that each can take; none for the method's own alone. step_mib: as Deal. paces: how fast each
    is; none where nobody is to do less for that. Raises SpryError where a method of the user's own deals out what there
    is not.
    """
    shared = [HEAD] if config.head == "shared" and HEAD in units else []
    dealt = tuple(unit for unit in units if unit not in shared)
    depth, blocks = depths(units)
    deal = Deal(
        units=dealt,
        depths=tuple(depth[unit] for unit in dealt),
        sizes=tuple(sum(tensors[name].numel() for name in units[unit]) for unit in dealt),
        blocks=blocks,
        memory_mib=tuple(memory_mib),
        round=round_,
        gradient=method.gradient.name,
        gradients=tuple(gradients),
        forward_ms=tuple(pace.forward_ms for pace in paces),
        steps=tuple(steps_in_full(pace.rows, method, config.client) for pace in paces),
        directions=config.client.directions,
        directions_at_once=config.client.directions_at_once,
    )
    deal = dataclasses.replace(deal, step_mib=step_mib) if step_mib else deal
    hands = method.assign(deal)
    unknown = sorted({unit for hand in hands for unit in hand} - set(dealt))
    if len(hands) != deal.clients or unknown:
        raise SpryError(
            f"`assign` of method={config.method!r} made {len(hands)} hands for {deal.clients} clients, with "
            f"unknown units {unknown}; it must make one hand a client, of deal.units."
        )
    return [Share.of(hand, shared) for hand in hands]
