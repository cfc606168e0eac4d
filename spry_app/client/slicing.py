"""The slices of a node's steps: as the run config says, or the largest that fit the memory it may take."""

import dataclasses
import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict

from spry_app.autodiff.budget import SMALLEST, DoesNotFit, Slices, fit, halved
from spry_app.autodiff.directions import Seed
from spry_app.autodiff.memory import MIB, is_out_of_memory, peak_mib, return_freed_memory
from spry_app.client.node import Node
from spry_app.client.step import Step
from spry_app.config import ADAPTER_KEYS, RunConfig
from spry_app.errors import OutOfMemory
from spry_app.methods import Method
from spry_app.methods.replay import exact_names
from spry_app.models.room import free_bytes

logger = logging.getLogger(__name__)

_SLICES = "slices."
"""Beginning of the names of what is kept in a node's state, one a gradient."""
_NONE_FIT = "no-slices"
"""Name of what is kept where a step on all units is beyond the budget: finding that out takes many steps."""
AUTO_PART = 0.5
"""Part of the free memory that "auto" takes: the rest is for what comes and goes beside a step."""


def slices_of(node: Node, method: Method, config: RunConfig, state: RecordDict, units: Sequence[str] = ()) -> Slices:
    """Chosen once a run and gradient, since trials take a step each, and kept in `state`, which Flower keeps for the
    node. units: on which the step is, and once for each lowest block of theirs; none for all units.
    """
    names = [name for unit in units or node.adapted.units for name in node.adapted.units[unit]]
    key = _SLICES + method.gradient.name + (f".{node.adapted.depth(names)}" if units else "")
    known: Any = state.get(key)
    if known is not None:
        return Slices(**known)
    chosen = _choose(node, method, config, names)
    _keep(chosen, state, key)
    return chosen


def slices_to_score(node: Node, method: Method, config: RunConfig, state: RecordDict) -> Slices:
    """Of passes without a gradient, which take less than a step: its slices on all units, or the smallest where the
    budget holds no step on so many.
    """
    if _NONE_FIT in state:
        return SMALLEST
    try:
        return slices_of(node, method, config, state)
    except OutOfMemory:
        state[_NONE_FIT] = ConfigRecord({})
        return SMALLEST


def give_less(state: RecordDict) -> Slices | None:
    """Smaller slices for the rest of the run, after a step that was out of memory, with whatever gradient: a process
    that was ended cannot say with which. None where none were chosen yet.
    """
    less = None
    for key in [key for key in state if key.startswith(_SLICES)]:
        known: Any = state[key]
        less = halved(Slices(**known))
        _keep(less, state, key)
    return less


def _keep(slices: Slices, state: RecordDict, key: str) -> None:
    state[key] = ConfigRecord(dict(dataclasses.asdict(slices)))


def most_at_once(node: Node, config: RunConfig) -> int:
    """How many directions may come to share a pass."""
    budgeted = node.memory_mib or config.client.memory_budget_mib
    return config.client.directions if budgeted else config.client.directions_at_once


def _choose(node: Node, method: Method, config: RunConfig, names: Sequence[str]) -> Slices:
    client = config.client
    budget, most = budget_mib(node, config), config.most_rows_at_once
    if not budget:
        return Slices(rows_as_set(config), min(client.directions_at_once, client.directions))
    tensors = {name: value for name, value in node.adapted.tensors().items() if name in set(names)}
    exact = exact_names(node.adapted.units, method, config.head_gradient) & tensors.keys()
    longest = node.train.by_length(range(len(node.train)))[::-1]

    def peak(slices: Slices) -> float:
        step = Step(node, method.gradient, exact, client.directions, slices)
        rows = list(itertools.islice(itertools.cycle(longest), slices.micro_batch))
        try:
            return peak_mib(lambda: step.estimate(rows, tensors, Seed(0, 0, 0, 0)), node.adapted.device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or slices == SMALLEST:
                raise
        return_freed_memory()
        return math.inf

    try:
        chosen = fit(peak, most, client.directions if method.gradient.slopes else 1, budget)
    except DoesNotFit as error:
        rank = f" or adapter.rank (now {config.adapter.rank})" if "rank" in ADAPTER_KEYS[config.adapter.kind] else ""
        raise OutOfMemory(
            f"A step on one example takes {error.least_mib:.1f} MiB beside the model on this node, and its budget is "
            f"{budget:.1f} MiB. Raise client.memory-budget-mib (or this node's memory-budget-mib), or lower "
            f"data.max-length (now {config.data.max_length}){rank}."
        ) from error
    logger.info("Within %.1f MiB a step: %s.", budget, chosen)
    return chosen


def rows_as_set(config: RunConfig) -> int:
    """Examples that pass at once where no budget decides."""
    most = config.most_rows_at_once
    return min(config.client.micro_batch or most, most)


def budget_mib(node: Node, config: RunConfig) -> float:
    """What a step may take on this node, as it says or else the run config; 0 where neither sets a budget."""
    return node.memory_mib or _mib(config.client.memory_budget_mib, node.adapted.device)


def _mib(budget: float | str, device: torch.device) -> float:
    """The run config's budget in MiB; 0 where it sets none."""
    if budget == "auto":
        return AUTO_PART * free_bytes(device) / MIB
    return float(budget or 0)
