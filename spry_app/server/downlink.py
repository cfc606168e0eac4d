"""What travels down: every tensor, or what was measured since a node last listened. Never what a round changes."""

import dataclasses
from collections import Counter, deque
from collections.abc import Callable

from spry_app.methods.global_state import GlobalState
from spry_app.protocol import CatchUp, Task
from spry_app.slope_log import Entry

MOST_LOSSES = 2
"""Messages that a node could not follow, after which it is sent every tensor for the rest of the run."""


class Downlink:
    """Every tensor, to every node, every time. Told what the server learns of the nodes, for those that can use it."""

    def __init__(self, state: GlobalState) -> None:
        self._state = state

    def met(self, node: int, digest: str) -> None:
        """The node has introduced itself; `digest` is of the tensors it starts from."""

    def outgoing(self, node: int, task: Task) -> Task:
        """`task`, whose tensors are all of them, as it is to be sent to this node."""
        return task

    def followed(self, node: int) -> None:
        """The node has answered its last message, so it holds what that told."""

    def lost(self, node: int) -> None:
        """The node has refused its last message, or failed."""

    def append(self, entry: Entry) -> None:
        """A round has changed the state."""


class Log(Downlink):
    """The slopes of the rounds that a node has missed, or every tensor where that is less (DeComFL, arXiv:2405.15861).

    A node that did not answer may have heard or not: it is sent what both cases need. Tensors that no scalar stands for
    travel as they are.
    """

    def __init__(self, state: GlobalState) -> None:
        super().__init__(state)
        self._start = state.digest()
        self._entries: deque[Entry] = deque()
        self._held: dict[int, int] = {}
        """Node -> round after which it holds the state, for certain."""
        self._sent: dict[int, int] = {}
        self._losses: Counter[int] = Counter()

    def met(self, node: int, digest: str) -> None:
        if node not in self._sent and digest == self._start:
            self._held.setdefault(node, 0)

    def outgoing(self, node: int, task: Task) -> Task:
        state = self._state
        self._sent[node] = state.round
        missed = self._missed(node)
        if missed is None:
            catch_up = CatchUp(state.round, state.digest(), moments=state.optimizer.moments)
            return dataclasses.replace(task, catch_up=catch_up)
        exact = {name: task.tensors[name] for name in sorted(state.exact)}
        return dataclasses.replace(
            task, tensors=exact, catch_up=CatchUp(self._held[node], state.digest(), tuple(missed))
        )

    def followed(self, node: int) -> None:
        if node in self._sent:
            self._held[node] = self._sent[node]

    def lost(self, node: int) -> None:
        self._held.pop(node, None)
        self._losses[node] += 1

    def append(self, entry: Entry) -> None:
        """Keeps no more than may ever be sent."""
        self._entries.append(entry)
        while len(self._entries) > 1 and self._bytes() - self._entries[0].size_bytes >= self._full_bytes():
            self._entries.popleft()

    def _missed(self, node: int) -> list[Entry] | None:
        """The rounds since the node listened; None where every tensor is less, or the only way."""
        held = self._held.get(node)
        if held is None or self._losses[node] >= MOST_LOSSES:
            return None
        missed = [entry for entry in self._entries if entry.round > held]
        return missed if sum(entry.size_bytes for entry in missed) < self._full_bytes() else None

    def _bytes(self) -> int:
        return sum(entry.size_bytes for entry in self._entries)

    def _full_bytes(self) -> int:
        """Of tensors and moments that the log stands in for."""
        state = self._state
        kept = [value for name, value in state.optimizer.tensors.items() if name not in state.exact]
        return sum(value.nbytes for value in [*kept, *state.optimizer.moments.values()])


DOWNLINKS: dict[str, Callable[[GlobalState], Downlink]] = {"weights": Downlink, "log": Log}
"""Method.send -> what does it."""
