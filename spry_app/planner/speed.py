"""How long a forward pass takes here, from a few blocks of the model with random weights. Nothing is trained."""

import statistics
import time

import torch

from spry_app.autodiff.directions import Seed
from spry_app.config import RunConfig
from spry_app.models.room import free_bytes
from spry_app.models.skeleton import META, weights_bytes
from spry_app.objectives import objective
from spry_app.planner.blank import model_of, node_of
from spry_app.tasks import get_task

BLOCKS = (1, 3)
"""Two depths; a pass takes as much longer for each further block as between them."""
TURNS = 5
PART = 0.5
"""Of the free memory that these blocks may take."""


def forward_ms(config: RunConfig, blocks: int, rows: int, length: int, device: torch.device) -> float | None:
    """Milliseconds of a forward pass of one example through all blocks, `rows` of them at once; None where not even a
    few blocks of the model fit here.
    """
    least = weights_bytes(model_of(config, META, BLOCKS[-1]).model)
    if least > PART * free_bytes(device):
        return None
    found = [_seconds(config, count, rows, length, device) for count in BLOCKS]
    each = max(0.0, (found[1] - found[0]) / (BLOCKS[1] - BLOCKS[0]))
    return 1e3 * (found[0] + each * (max(1, blocks) - BLOCKS[0])) / rows


@torch.no_grad()
def _seconds(config: RunConfig, blocks: int, rows: int, length: int, device: torch.device) -> float:
    node = node_of(model_of(config, device, blocks), get_task(config.data), rows, length)
    loss = objective(node.adapted, node.train, range(rows), Seed(0, 0, 0, 0))
    turns = []
    for _ in range(1 + TURNS):  # the first one also loads code
        started = time.perf_counter()
        float(loss(node.start))
        turns.append(time.perf_counter() - started)
    return statistics.median(turns[1:])
