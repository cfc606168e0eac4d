"""The update that scalars stand for: client and server both come here, so they get the same bits."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spry_app.autodiff.directions import Seed, Tensors
from spry_app.autodiff.gradients import Gradient
from spry_app.config import ClientConfig
from spry_app.methods.method import Method
from spry_app.optimizers import CLIENT_OPTIMIZERS, NamedOptimizer, Rule

HEAD = "head"
"""Name of the unit that is the classification head."""


def local_optimizer(
    start: Tensors, units: Mapping[str, Sequence[str]], config: ClientConfig, scale: float = 1.0
) -> NamedOptimizer:
    """A client's optimizer at the start of its task, over copies of `start`: the head has a step size of its own.

    scale: part of the step sizes that is taken (schedule.py).
    """
    rule = Rule(config.optimizer, scale * config.learning_rate, weight_decay=config.weight_decay)
    head_rate = scale * (config.head_learning_rate or config.learning_rate)
    rates = {name: head_rate for name in units.get(HEAD, ()) if name in start}
    return NamedOptimizer(start, CLIENT_OPTIMIZERS, rule, rates)


def local_steps(method: Method, config: ClientConfig) -> int:
    """Local steps a round where their number is fixed; 0 where it follows from the epochs and the shard."""
    return config.local_steps or (0 if method.reply == "weights" else 1)


def steps_in_full(rows: int, method: Method, config: ClientConfig) -> int:
    """Local steps of all of a task: as many as the config fixes, or whole passes over the rows."""
    return local_steps(method, config) or config.local_epochs * math.ceil(rows / config.batch_size)


def passes(rows: int, method: Method, config: ClientConfig) -> int:
    """In how many batches of a task each of a client's rows is at the most: it is in one of each pass."""
    steps = local_steps(method, config)
    return math.ceil(steps / math.ceil(max(1, rows) / config.batch_size)) if steps else config.local_epochs


def exact_names(units: Mapping[str, Sequence[str]], method: Method, head_gradient: str) -> set[str]:
    """Tensors whose gradient is exact although the method uses slopes: they travel as they are, never as scalars."""
    return set(units.get(HEAD, ())) if method.gradient.slopes and head_gradient == "exact" else set()


@dataclass(frozen=True)
class Seat:
    """Which directions a client of a round takes.

    number, sharing: as client and sharing of a Seed. directions: how many a batch, K in the papers.
    """

    number: int
    sharing: int
    directions: int


def seats(method: Method, directions: Sequence[int], perturbed: Sequence[Mapping[str, int]]) -> list[Seat]:
    """directions: how many each client is to take. perturbed: for each, the tensors that its slopes are for, and how
    many numbers each has.

    Orthogonal directions: those with the same tensors share a frame, and nobody takes more than it has.
    """
    if method.directions == "gaussian":
        shared = method.seeds == "shared"
        return [Seat(0 if shared else client, 0, count) for client, count in enumerate(directions)]
    groups = Counter(frozenset(tensors) for tensors in perturbed)
    taken = Counter[frozenset[str]]()
    found = []
    for count, tensors in zip(directions, perturbed, strict=True):
        group, most = frozenset(tensors), max(1, sum(tensors.values()))
        number, sharing = (0, 1) if method.seeds == "shared" else (taken[group], groups[group])
        found.append(Seat(number, sharing, min(count, most)))
        taken[group] += 1
    return found


def replay(optimizer: NamedOptimizer, slopes: Sequence[Sequence[float]], seed: Seed, gradient: Gradient) -> Tensors:
    """Repeat a client's local steps from what it measured (SPRY's per-iteration mode, arXiv:2405.15551).

    optimizer: over the client's tensors before its first step. slopes: K numbers for each of the T steps. seed: of
    step 0. gradient: the way they were measured, which knows what they stand for.
    """
    for step, measured in enumerate(slopes):
        at = dataclasses.replace(seed, step=seed.step + step)
        optimizer.step(gradient.combine(measured, at, optimizer.tensors))
    return optimizer.tensors
