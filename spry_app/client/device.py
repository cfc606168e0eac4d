"""What this node's machine is and how fast it passes the model: asked once, before the run. Nothing is trained here."""

import os
import platform
import time
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch.nn import Module

from spry_app.autodiff.directions import Seed
from spry_app.autodiff.memory import MIB, peak_mib
from spry_app.client.node import Node
from spry_app.client.power import power_of
from spry_app.client.slicing import budget_mib, rows_as_set
from spry_app.config import RunConfig
from spry_app.models.room import free_bytes
from spry_app.objectives import objective
from spry_app.protocol import Device

TURNS = 5
"""Passes that are timed; the least time counts, so that neither the first one does, nor what else the machine did."""
MOST_S = 2.0
"""After which no further pass is begun."""
SOME = 256
"""Rows, about, among which that of median length is looked for."""
_timed: WeakKeyDictionary[Module, dict[tuple[str, int, int], float]] = WeakKeyDictionary()
"""Milliseconds by budget, rows at once and length: nodes in one process share the model."""


def device_of(node: Node, config: RunConfig) -> Device:
    """Where `privacy.mode` promises something, nothing: how long its rows are shows in a time."""
    if config.privacy.mode:
        return Device()
    device = node.adapted.device
    power = power_of(device)
    return Device(
        accelerator=_name(device),
        forward_ms=node.forward_ms or _forward_ms(node, config),
        free_mib=free_bytes(device) / MIB,
        battery_percent=power.battery_percent,
        plugged=power.plugged,
        power_limit_w=power.limit_w,
    )


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


@torch.no_grad()
def _forward_ms(node: Node, config: RunConfig) -> float:
    """Of one example of the node's median length, with as many at once as a step may have and the node's budget holds:
    what passes alone takes longer.
    """
    some = node.train.by_length(range(0, len(node.train), max(1, len(node.train) // SOME)))
    middle, known = some[len(some) // 2], _timed.setdefault(node.adapted.model, {})
    budget = str(node.memory_mib or config.client.memory_budget_mib)
    key = (budget, rows_as_set(config), node.train.length(middle))
    if key not in known:
        rows = [middle] * _at_once(node, config, middle)
        known[key] = 1e3 * _seconds(_pass(node, rows)) / len(rows)
    return known[key]


def _pass(node: Node, rows: list[int]) -> Callable[[], float]:
    loss = objective(node.adapted, node.train, rows, Seed(0, 0, 0, 0))
    return lambda: float(loss(node.start))


def _at_once(node: Node, config: RunConfig, row: int) -> int:
    budget, most = budget_mib(node, config), rows_as_set(config)
    if not budget or most == 1:
        return most
    one = peak_mib(_pass(node, [row]), node.adapted.device)
    return max(1, min(most, int(budget / one))) if one > 0 else most


def _seconds(one_pass: Callable[[], float]) -> float:
    begun, turns = time.perf_counter(), list[float]()
    while len(turns) < TURNS and time.perf_counter() - begun < MOST_S:
        started = time.perf_counter()
        one_pass()
        turns.append(time.perf_counter() - started)
    return min(turns)
