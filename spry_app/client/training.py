"""One client's work in one round: local steps on the units it was given. Models and rows come from node.py."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from spry_app.autodiff.budget import Slices
from spry_app.autodiff.costs import suffix_above
from spry_app.autodiff.directions import Seed, Tensors
from spry_app.autodiff.memory import MIB, with_peak
from spry_app.client.deadline import Clock, until
from spry_app.client.examples import by_example
from spry_app.client.local import LocalTraining
from spry_app.client.node import Node
from spry_app.client.step import Step
from spry_app.config import RunConfig
from spry_app.data import batches
from spry_app.methods import Method
from spry_app.methods.replay import exact_names, local_optimizer, steps_in_full
from spry_app.methods.schedule import client_scale
from spry_app.prefix import PrefixCache, may_start_at
from spry_app.protocol import Score, Task, TrainReply


def train(
    node: Node, task: Task, method: Method, config: RunConfig, slices: Slices, clock: Clock = time.monotonic
) -> TrainReply:
    """Start from the task's tensors, step only the task's units, and reply as the method says."""
    started = clock()
    node.adapted.load_tensors(task.tensors)
    own = {name: task.tensors[name] for unit in task.units for name in node.adapted.units[unit]}
    exact = exact_names(node.adapted.units, method, config.head_gradient) & own.keys()
    optimizer = local_optimizer(own, node.adapted.units, config.client, client_scale(config, method, task.round))
    local, peak = LocalTraining(optimizer, method), 0.0
    first = Seed(config.seed, task.round, task.number, step=0, sharing=task.sharing)
    with prefix_of(node, own, config) as prefix:
        before = prefix.forwards if prefix else 0.0
        suffix = suffix_above(node.adapted.depth(own), len(node.adapted.blocks))
        gradient = method.pick.gradient(method.gradient, task.update, config.client)
        alone = by_example(task, len(node.train), config)
        step = Step(node, gradient, exact, task.directions, slices, prefix, suffix, alone)
        whole = steps_in_full(len(node.train), method, config.client)
        steps = _local_batches(min(whole, task.steps or whole), len(node.train), task, config)
        for number, rows in enumerate(until(started + (task.deadline_s or math.inf), steps, clock)):
            seed = dataclasses.replace(first, step=number)
            if task.measure and number == 0:
                run = functools.partial(step.estimate, rows, local.tensors, seed)
                (estimate, forwards), peak = with_peak(run, node.adapted.device)
            else:
                estimate, forwards = step.estimate(rows, local.tensors, seed)
            local.take(estimate, len(rows), forwards)
    return TrainReply(
        tensors=local.outgoing(exact),
        slopes=local.slopes(exact),
        loss=local.loss / local.examples,
        examples=local.examples,
        seconds=clock() - started,
        forwards=local.forwards + (prefix.forwards - before if prefix else 0.0),
        peak_mib=peak,
        personal=_personal(node, task, local.tensors, config, slices) if task.evaluate else None,
        steps=local.steps,
        steps_asked=whole,
    )


@contextmanager
def prefix_of(node: Node, own: Iterable[str], config: RunConfig) -> Iterator[PrefixCache | None]:
    """Where passes begin: below all of the client's tensors nothing changes during its task, unless dropout makes it
    random; below those of all clients, nothing ever.
    """
    depth, client = node.adapted.depth(own), config.client
    bottom = node.frozen(node.train, client)
    here = client.prefix_cache_mib and not config.adapter.dropout and may_start_at(node.adapted, node.train, depth)
    if not here or (bottom and bottom.depth == depth):
        yield bottom
        return
    parts = 2 if bottom else 1
    memory, disk = client.prefix_cache_mib * MIB // parts, client.prefix_cache_disk_mib * MIB // parts
    cache = PrefixCache(node.adapted, node.train, depth, memory, disk, bottom)
    try:
        yield cache
    finally:
        cache.close()


def _local_batches(steps: int, rows: int, task: Task, config: RunConfig) -> Iterator[list[int]]:
    """Of so many steps: passes over all rows, in a fresh order each."""
    endless = (
        batch
        for epoch in itertools.count()
        for batch in batches(rows, config.client.batch_size, (config.seed, task.round, task.client, epoch))
    )
    return itertools.islice(endless, steps)


def _personal(node: Node, task: Task, trained: Tensors, config: RunConfig, slices: Slices) -> Score | None:
    if not len(node.heldout):
        return None
    node.adapted.load_tensors(task.tensors | trained)
    return node.score(config.client, slices)
