"""Methods whose clients take gradients of unequal kinds, named by tests as "mixed_fleet:name"."""

import dataclasses

from spry_app.autodiff.gradients import GRADIENTS
from spry_app.methods import METHODS, Deal, Method, Share

KINDS = (("checkpointed-backprop", 1), ("", 1), ("", 0))
"""Of clients 0, 1, 2: an exact gradient; one direction of the method's own; as many as are set."""


def unequal(deal: Deal) -> list[Share]:
    """Every unit to everyone."""
    return [Share(deal.units, *KINDS[client % len(KINDS)]) for client in range(deal.clients)]


def backward(deal: Deal) -> list[Share]:
    """The other way round: a method of exact gradients, with a client that takes forward mode."""
    return [Share(deal.units, "forward-mode" if client else "") for client in range(deal.clients)]


def fewer(deal: Deal) -> list[Share]:
    """Every unit to everyone; to the first client one local step of it."""
    return [Share(deal.units, steps=0 if client else 1) for client in range(deal.clients)]


def unknown(deal: Deal) -> list[Share]:
    return [Share(deal.units, "psychic") for client in range(deal.clients)]


mixed = dataclasses.replace(METHODS["spry"], assign=unequal)
mixed_gradient = dataclasses.replace(METHODS["fedsgd"], gradient=GRADIENTS["forward-mode"], assign=unequal)
mixed_slopes = dataclasses.replace(METHODS["spry-per-iteration"], assign=unequal)
mixed_nearest = dataclasses.replace(METHODS["fwdllm"], assign=unequal)
mostly_exact = dataclasses.replace(METHODS["fedavg"], assign=backward)
fewer_steps = dataclasses.replace(METHODS["spry"], assign=fewer)
fewer_slopes = dataclasses.replace(METHODS["spry-per-iteration"], assign=fewer)
nowhere: Method = dataclasses.replace(METHODS["spry"], assign=unknown)
