"""Which candidate directions a client uses, as values of a Method. How they are drawn and measured is autodiff's."""

from collections.abc import Callable
from dataclasses import dataclass

from spry_app.autodiff.candidates import nearest
from spry_app.autodiff.directions import Tensors
from spry_app.autodiff.gradients import Gradient
from spry_app.config import ClientConfig


@dataclass(frozen=True)
class Pick:
    """gradient: (the method's, the last global update, config) -> the one that a task uses.

    needs_update: the server sends the last update with the task; else that argument is empty.
    """

    gradient: Callable[[Gradient, Tensors, ClientConfig], Gradient]
    needs_update: bool = False


FIRST = Pick(lambda gradient, update, config: gradient)
"""Directions 0 to K - 1 of the seed."""
NEAREST = Pick(
    lambda gradient, update, config: nearest(
        gradient, update, max(config.candidates, config.directions), config.variance_threshold
    ),
    needs_update=True,
)
"""Those nearest to the last global update, until the variance of the estimate is low enough (FwdLLM)."""
