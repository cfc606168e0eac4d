"""Which nodes there are and which of them can be used: waiting with a deadline, introductions, sampling."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from logging import INFO, WARNING

import numpy as np
from flwr.app import Message
from flwr.common.logger import log
from flwr.serverapp import Grid

from spry_app.config import ServerConfig
from spry_app.errors import SpryError
from spry_app.methods import Pace
from spry_app.protocol import (
    Introduction,
    MalformedReply,
    Tensors,
    error_reason,
    introduction_request,
    refusal_reason,
    said,
    size_bytes,
    with_frame,
)
from spry_app.server.devices import sentence
from spry_app.server.letters import Letters

_POLL_S = 0.5
Choose = Callable[[Sequence[float], Sequence[tuple[str, ...]]], str]
"""(of each node the MiB that a step may take, 0.0 where it has not said; the gradients that it can take) -> name of the
one for all; "" for the method's.
"""
MOST_TRIES = 3
"""Introductions that may fail or stay without an answer before a node is left out for the rest of the run."""


class Fleet:
    """The nodes of a run. A node is asked to introduce itself once, and used only if its base model is the server's.

    frame: what nodes cannot compute of the adapter, sent to each once. sent: is told the bytes of that.
    """

    def __init__(
        self,
        config: ServerConfig,
        fingerprint: str,
        frame: Tensors | None = None,
        sent: Callable[[int], None] = lambda size_bytes: None,
    ) -> None:
        self._config = config
        self._fingerprint = fingerprint
        self._frame, self._sent = frame, sent
        self._holding: set[int] = set()
        """Nodes that were sent the frame, and have not failed since."""
        self.introductions: dict[int, Introduction] = {}
        """Of the nodes that can be used."""
        self._refused: dict[int, str] = {}
        """Nodes that are not asked again, and why."""
        self._failed: Counter[int] = Counter()
        self.limits: dict[int, float] = {}
        """Of nodes that were out of memory, MiB; a checkpoint keeps them."""
        self.choose: Choose | None = None
        """Of one gradient for all nodes, where the run leaves it open (choice.py); None where it says which."""

    def available(self, grid: Grid) -> list[int]:
        """Connected, usable nodes, in the order of their partitions (node ids differ from run to run).

        Waits for `server.min-available-nodes`; raises SpryError when fewer came in time or can be used.
        """
        needed = self._config.min_available_nodes
        while True:
            connected = self._wait(grid, needed)
            self._meet(grid, [node for node in connected if not self._known(node)])
            usable = [node for node in connected if node in self.introductions]
            if len(usable) >= needed or all(map(self._known, connected)):
                break
        if len(usable) < needed:
            reasons = Counter(self._refused[node] for node in connected if node in self._refused)
            raise SpryError(
                f"{len(usable)} of {len(connected)} connected nodes can be used; server.min-available-nodes is "
                f"{needed}. " + " ".join(f"{count} said: {reason}" for reason, count in reasons.most_common())
            )
        return sorted(usable, key=lambda node: (self.introductions[node].partition, node))

    def sample(
        self,
        nodes: list[int],
        fraction: float,
        least: int,
        seed: tuple[int, ...],
        order: Sequence[int] | None = None,
    ) -> list[int]:
        """A seeded choice of `fraction` of the nodes, at least `least`, in their order; or the first so many of `order`
        (positions in `nodes`), in that order, which then tells nobody who was drawn beside oneself.
        """
        count = min(len(nodes), max(least, round(fraction * len(nodes))))
        if order is not None:
            return [nodes[index] for index in order[:count]]
        drawn = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed))).permutation(len(nodes))[:count]
        return [nodes[index] for index in sorted(drawn.tolist())]

    def memory_mib(self, nodes: Sequence[int]) -> list[float]:
        """What a training step may take on each of these available nodes, MiB; 0.0 where it has not said."""
        stated = (self.introductions[node].memory_mib or math.inf for node in nodes)
        least = [min(own, self.limits.get(node, math.inf)) for node, own in zip(nodes, stated, strict=True)]
        return [0.0 if memory == math.inf else memory for memory in least]

    def paces(self, nodes: Sequence[int]) -> list[Pace]:
        """How fast each of these available nodes is, and how much there is to do on it, as it says."""
        found = (self.introductions[node] for node in nodes)
        return [Pace(said.device.forward_ms or 0.0, said.examples) for said in found]

    def gradients(self, nodes: Sequence[int]) -> list[tuple[str, ...]]:
        """Names of those that each of these available nodes can take."""
        return [self.introductions[node].gradients for node in nodes]

    def gradient(self, nodes: Sequence[int]) -> str:
        """Name of the one that every client takes, where it was chosen for these available nodes; else ""."""
        return self.choose(self.memory_mib(nodes), self.gradients(nodes)) if self.choose else ""

    def limit(self, node: int, memory_mib: float) -> None:
        """From now on it may take no more than so much, whatever it has said."""
        self.limits[node] = min(memory_mib, self.limits.get(node, math.inf))

    def examples(self, nodes: Sequence[int]) -> list[int]:
        """How many rows each of these available nodes trains on, as it says."""
        return [self.introductions[node].examples for node in nodes]

    def digest(self, node: int) -> str:
        """Of the tensors that this available node starts from."""
        return self.introductions[node].digest

    def equip(self, message: Message) -> Message:
        """With the frame, where its node may not hold it."""
        node = message.metadata.dst_node_id
        if self._frame is None or node in self._holding:
            return message
        self._holding.add(node)
        return with_frame(message, self._frame)

    def lost(self, node: int) -> None:
        """The node has refused or failed, and may have forgotten what it was sent."""
        self._holding.discard(node)

    def _known(self, node: int) -> bool:
        return node in self.introductions or node in self._refused

    def _wait(self, grid: Grid, needed: int) -> list[int]:
        deadline = time.monotonic() + self._config.wait_timeout_s
        while True:
            nodes = sorted(grid.get_node_ids())
            if len(nodes) >= needed:
                return nodes
            if time.monotonic() > deadline:
                raise SpryError(
                    f"{len(nodes)} of {needed} nodes connected within {self._config.wait_timeout_s:g} s. Start more "
                    "nodes, or lower server.min-available-nodes, or raise server.wait-timeout-s."
                )
            time.sleep(_POLL_S)

    def _meet(self, grid: Grid, nodes: list[int]) -> None:
        if not nodes:
            return
        log(INFO, "Asking %d nodes to load their model and rows", len(nodes))
        requests = [self.equip(introduction_request(node, self._fingerprint)) for node in nodes]
        if self._frame is not None:
            self._sent(sum(map(size_bytes, requests)))
        letters, failures = Letters(requests), dict.fromkeys(nodes, "no answer within server.round-timeout-s")
        for reply in grid.send_and_receive(requests, timeout=self._config.round_timeout_s):
            try:
                node = letters.sender(reply)
            except MalformedReply as error:
                log(WARNING, "An introduction of node %s is not used: %s", reply.metadata.src_node_id, error)
                continue
            if reason := error_reason(reply):
                failures[node] = said(reason)
            else:
                self._read(node, reply)
        for node in nodes:
            if node not in self.introductions:
                self._fail(node, failures[node])
        if met := [self.introductions[node] for node in nodes if node in self.introductions]:
            log(INFO, "%s", sentence(met))

    def _fail(self, node: int, reason: str) -> None:
        """What was the node's own answer stays; what happened to it may pass."""
        self.lost(node)
        self._failed[node] += 1
        if self._failed[node] == MOST_TRIES:
            self._refused.setdefault(node, reason)
        again = "" if node in self._refused else "; it is asked again"
        log(WARNING, "Node %s cannot be used: %s%s", node, self._refused.get(node, reason), again)

    def _read(self, node: int, reply: Message) -> None:
        try:
            if reason := refusal_reason(reply):
                raise MalformedReply(reason)
            introduction = Introduction.from_message(reply)
            if introduction.fingerprint != self._fingerprint:
                raise MalformedReply("its base model is not the server's, and it did not say so")
            self.introductions[node] = introduction
        except MalformedReply as error:
            self._refused[node] = said(str(error))
