"""What leaves a node in a run with privacy: the mechanism on its replies (mode "local"), and what it keeps to itself in
either mode. Nothing here trains; the mechanism on single rows is in examples.py.
"""

import dataclasses

import torch
from flwr.supercore.utils import get_flwr_home

from spry_app.config import PrivacyConfig, RunConfig
from spry_app.errors import SpryError
from spry_app.methods import Method
from spry_app.privacy import Secret, bounded, noisy
from spry_app.protocol import Task, Tensors, TrainReply


def protected(reply: TrainReply, task: Task, method: Method, config: RunConfig) -> TrainReply:
    """The reply as it may be sent: without loss and personal score, and in mode "local" bounded and with noise, unless
    the steps that it was made of had theirs (unit "example").

    The noise follows from a key of this node's own, which no message carries; see `privacy.noisy`. What is not covered:
    numbers of examples and of passes, seconds, memory, and that the node answers.
    """
    if not config.privacy.mode:
        return reply
    reply = dataclasses.replace(reply, loss=0.0, personal=None)
    if config.privacy.mode == "central" or config.privacy.unit == "example":
        return reply
    secret = own_secret()
    about = ("reply", config.seed, task.round, task.client)
    start = {} if method.reply == "gradient" else task.tensors
    return dataclasses.replace(
        reply,
        tensors=_tensors(reply.tensors, start, config.privacy, secret, *about),
        slopes=_slopes(reply.slopes, config.privacy, secret, *about),
    )


def own_secret() -> Secret:
    """Of this node, or of all nodes of a simulation."""
    return Secret.at(get_flwr_home() / "spry" / "noise.key")


def check_scoring(config: RunConfig) -> None:
    """Raises SpryError where the node's rows are not to be scored for the server."""
    if config.privacy.mode:
        raise SpryError(
            f"privacy.mode={config.privacy.mode!r}: this node does not say how well the model does on its rows; give "
            "the server a test set (data.test)."
        )


def _tensors(tensors: Tensors, start: Tensors, privacy: PrivacyConfig, secret: Secret, *about: str | int) -> Tensors:
    """Moves from `start`, or where it is empty from zero, with noise; then where that leads."""
    moves = {name: value.double() - start[name] if start else value.double() for name, value in tensors.items()}
    told = noisy(bounded(moves, privacy.clip), privacy.noise_multiplier * privacy.clip, secret, "tensors", *about)
    return {name: (start[name] + move if start else move).to(tensors[name].dtype) for name, move in told.items()}


def _slopes(
    slopes: tuple[tuple[float, ...], ...], privacy: PrivacyConfig, secret: Secret, *about: str | int
) -> tuple[tuple[float, ...], ...]:
    if not slopes:
        return slopes
    within = bounded({"slopes": torch.tensor(slopes, dtype=torch.float64)}, privacy.clip_slopes)
    told = noisy(within, privacy.noise_multiplier * privacy.clip_slopes, secret, "slopes", *about)
    return tuple(map(tuple, told["slopes"].tolist()))
