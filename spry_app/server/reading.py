"""From messages to replies that can be averaged: whose each is, and what it was asked. What makes one unfit, or is cut
of it, is decided in checks.py and clipping.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from flwr.app import Message

from spry_app.protocol import MalformedReply, Task, TrainReply, size_bytes
from spry_app.server.guard import Accepted
from spry_app.server.late import Ended
from spry_app.server.letters import Letters
from spry_app.server.record import Recorder


class Reader:
    """check: raises MalformedReply for a node that has not answered. problem: why a reply cannot be used; empty if it
    can. clipped: no more of it than one client may ask for.
    """

    def __init__(
        self,
        recorder: Recorder,
        check: Callable[[Message, int], None],
        problem: Callable[[TrainReply, Task], str],
        clipped: Callable[[Task, TrainReply], TrainReply],
    ) -> None:
        self._recorder, self._check, self._problem, self._clipped = recorder, check, problem, clipped

    def read(self, replies: Iterable[Message], letters: Letters, tasks: Mapping[int, Task]) -> Accepted:
        """In the order of the clients (that of arrival differs from run to run), without those that are refused.

        letters, tasks: that they answer.
        """
        accepted: dict[int, tuple[Task, TrainReply]] = {}
        for message in replies:
            node = message.metadata.src_node_id
            try:
                self._recorder.received(size_bytes(message))
                node = letters.sender(message)
                self._check(message, node)
                task, reply = tasks[node], TrainReply.from_message(message, self._recorder.task.sums)
                if reason := self._problem(reply, task):
                    raise MalformedReply(reason)
                accepted[task.client] = (task, self._clipped(task, reply))
            except MalformedReply as error:
                self._recorder.refuse(node, str(error))
        return [accepted[client] for client in sorted(accepted)]

    def late(self, rounds: Sequence[Ended]) -> Accepted:
        """Those that came after their rounds, round by round."""
        found: Accepted = []
        for ended in rounds:
            used = self.read(ended.come, ended.letters, ended.tasks)
            self._recorder.late(ended.tasks, used)
            found += used
        return found
