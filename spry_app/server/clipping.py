"""What one client may do to the model at the most: replies that ask for more are cut, not refused. Whether a reply is
sound is decided before (checks.py).
"""

import dataclasses
from collections.abc import Mapping

import torch

from spry_app.config import ServerConfig
from spry_app.privacy import bounded
from spry_app.protocol import Tensors, TrainReply


def clipped(reply: TrainReply, start: Mapping[str, torch.Tensor], config: ServerConfig) -> TrainReply:
    """The reply within `server.max-slope` and `server.max-update-norm`; itself where it is within them, or they are 0.

    start: the values from which its tensors have moved; zeros for a gradient. The norm is that of all moves of the
    client together, so that directions stay as they are.
    """
    slopes, tensors = reply.slopes, reply.tensors
    if config.max_slope:
        bound = config.max_slope
        slopes = tuple(tuple(max(-bound, min(bound, slope)) for slope in step) for step in slopes)
    if config.max_update_norm:
        tensors = _within(tensors, start, config.max_update_norm)
    if slopes == reply.slopes and tensors is reply.tensors:
        return reply
    return dataclasses.replace(reply, slopes=slopes, tensors=tensors)


def _within(tensors: Tensors, start: Mapping[str, torch.Tensor], most: float) -> Tensors:
    moves = {name: value - start[name] for name, value in tensors.items()}
    within = bounded(moves, most)
    return tensors if within is moves else {name: start[name] + move for name, move in within.items()}
