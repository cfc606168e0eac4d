"""Replies that come after their round has ended: lost, or waited for and handed out once. How they are read and what
they weigh is decided elsewhere.

Flower keeps a reply until it is pulled by the id of what it answers, or the message is twelve hours old, so that a
later round can have what an earlier one did not wait for.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from spry_app.protocol import Task
from spry_app.server.letters import Letters


@dataclass
class Ended:
    """A round that has ended without some replies. until: when they are given up. come: those that have come since."""

    letters: Letters
    tasks: Mapping[int, Task]
    until: float
    come: list[Message] = field(default_factory=list)

    def missing(self) -> dict[str, int]:
        """Message -> its node."""
        come = {message.metadata.reply_to_message_id for message in self.come}
        return {letter: node for letter, node in self.letters.waiting().items() if letter not in come}


class Dropped:
    """Nobody waits.

    patience_s: for how long after its round a reply is waited for. clock: seconds that only ever grow.
    """

    def __init__(self, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.patience_s, self.clock = patience_s, clock

    def look(self, grid: Grid) -> None:
        """Whether any have come."""

    def free(self, nodes: Sequence[int]) -> list[int]:
        """Those that are at work on nothing; all, where no other is."""
        return list(nodes)

    def come(self) -> Sequence[Ended]:
        """The rounds of which replies have come, with these; each is handed out once."""
        return []

    def closed(self, letters: Letters, tasks: Mapping[int, Task]) -> list[int]:
        """A round has ended; the nodes that it goes without."""
        return letters.given_up()


class Awaited(Dropped):
    """Each reply is waited for until it comes or its time is over. A node that is at work on one is given nothing else
    meanwhile (as in FedBuff, arXiv:2106.06639): its replies would come later and later.
    """

    def __init__(self, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(patience_s, clock)
        self._ended: list[Ended] = []
        self._grid: Grid | None = None

    def look(self, grid: Grid) -> None:
        self._grid = grid
        for ended in self._ended:
            if missing := ended.missing():
                ended.come += grid.pull_messages(list(missing))

    def free(self, nodes: Sequence[int]) -> list[int]:
        busy = {node for ended in self._ended for node in ended.missing().values()}
        return [node for node in nodes if node not in busy] or list(nodes)

    def come(self) -> Sequence[Ended]:
        if self._grid is not None:
            self.look(self._grid)
        found = [Ended(each.letters, each.tasks, each.until, each.come) for each in self._ended if each.come]
        for each in self._ended:
            each.come = []
        return found

    def closed(self, letters: Letters, tasks: Mapping[int, Task]) -> list[int]:
        now, rest = self.clock(), letters.rest()
        self._ended.append(Ended(rest, tasks, now + self.patience_s))
        self._ended = [each for each in self._ended if now < each.until and each.missing()]
        return sorted(rest.waiting().values())


LATE_REPLIES: dict[str, Callable[[float], Dropped]] = {"drop": Dropped, "discount": Awaited}
"""server.late-replies -> what becomes of them."""
