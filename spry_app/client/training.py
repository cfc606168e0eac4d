"""One client's work in one round: local steps on the units it was given. Models and rows come from node.py."""

import functools
import itertools
import time
from collections.abc import Iterator, Set

from spry_app.autodiff.directions import Seed, Tensors
from spry_app.autodiff.exact import estimate_with_exact
from spry_app.autodiff.gradients import Estimate
from spry_app.autodiff.memory import with_peak
from spry_app.client.node import Node
from spry_app.config import RunConfig
from spry_app.data import batches
from spry_app.methods import Method
from spry_app.methods.replay import client_rule, exact_names, local_steps
from spry_app.objectives import batch_of, score
from spry_app.optimizers import CLIENT_OPTIMIZERS, NamedOptimizer
from spry_app.protocol import Score, Task, TrainReply


def train(node: Node, task: Task, method: Method, config: RunConfig) -> TrainReply:
    """Start from the task's tensors, step only the task's units, and reply as the method says."""
    started = time.monotonic()
    node.adapted.load_tensors(task.tensors)
    own = {name: task.tensors[name] for unit in task.units for name in node.adapted.units[unit]}
    exact = exact_names(node.adapted.units, method, config.head_gradient) & own.keys()
    optimizer = NamedOptimizer(own, CLIENT_OPTIMIZERS, client_rule(config.client))
    slopes: list[tuple[float, ...]] = []
    losses, examples, peak = 0.0, 0, 0.0
    for step, rows in enumerate(_local_batches(len(node.train), task, method, config)):
        seed = Seed(run=config.seed, round=task.round, client=task.client, step=step)
        run = functools.partial(_estimate, node, rows, method, exact, optimizer.tensors, seed, config)
        if task.measure and step == 0:
            estimate, peak = with_peak(run, node.adapted.device)
        else:
            estimate = run()
        optimizer.step(estimate.gradient)
        slopes.append(estimate.slopes)
        losses, examples = losses + estimate.loss * len(rows), examples + len(rows)
    trained = {name: value.clone() for name, value in optimizer.tensors.items()}
    return TrainReply(
        tensors=trained if method.reply == "weights" else {name: trained[name] for name in sorted(exact)},
        slopes=tuple(slopes) if method.reply == "slopes" and own.keys() - exact else (),
        loss=losses / examples,
        examples=examples,
        seconds=time.monotonic() - started,
        peak_mib=peak,
        personal=_personal(node, task, trained, config) if task.evaluate else None,
    )


def _estimate(
    node: Node,
    rows: list[int],
    method: Method,
    exact: Set[str],
    tensors: Tensors,
    seed: Seed,
    config: RunConfig,
) -> Estimate:
    batch = batch_of(node.adapted, node.train, rows, config.client.micro_batch, seed)
    client = config.client
    return estimate_with_exact(
        method.gradient, batch, tensors, exact, seed, client.directions, client.directions_at_once
    )


def _local_batches(rows: int, task: Task, method: Method, config: RunConfig) -> Iterator[list[int]]:
    """Whole passes in a fresh order each; cut or prolonged to the number of steps where the config fixes it."""
    steps = local_steps(method, config.client)
    passes = itertools.count() if steps else range(config.client.local_epochs)
    endless = (
        batch
        for epoch in passes
        for batch in batches(rows, config.client.batch_size, (config.seed, task.round, task.client, epoch))
    )
    return itertools.islice(endless, steps or None)


def _personal(node: Node, task: Task, trained: Tensors, config: RunConfig) -> Score | None:
    if not len(node.heldout):
        return None
    node.adapted.load_tensors(task.tensors | trained)
    return score(node.adapted, node.heldout, config.client.batch_size)
