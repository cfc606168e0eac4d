"""What becomes of step sizes over the rounds of a run. Rules that use them are elsewhere."""

import math
from collections.abc import Callable

from spry_app.config import RunConfig
from spry_app.methods.method import Method

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: round((1.0 + math.cos(math.pi * done)) / 2, 9),  # the same on every machine
}
"""Part of the rounds that are over -> part of the step size that is left."""


def server_scale(config: RunConfig, method: Method, round_: int) -> float:
    """Of the server's step sizes in a round (from 1)."""
    return 1.0 if method.server_optimizer == "average" else _scale(config, round_)


def client_scale(config: RunConfig, method: Method, round_: int) -> float:
    """Of the clients' step sizes, where the server takes the mean of what comes of them as it is."""
    return _scale(config, round_) if method.server_optimizer == "average" else 1.0


def _scale(config: RunConfig, round_: int) -> float:
    return SCHEDULES[config.schedule]((round_ - 1) / config.num_server_rounds)
