"""A federation in this process whose nodes' work is written down, with how long its rounds would last on boxes that are
as fast as they say. Nothing is decided here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import Message

from benchmarks.local_grid import LocalGrid
from spry_app.config import Scalar
from spry_app.protocol import INTRODUCE, TRAIN, Introduction, Task, TrainReply, refusal_reason, size_bytes

Work = Mapping[str, Any]
"""Of one answer. "round": 0 before the first; "partition"; "refused": why, and then no more. Of an introduction "rows"
to train on. Of a round's task "gradient" (empty for the method's), "units", "forwards" (passes of one example), "s"
that it took here, "box-s" that those passes take on a box as fast as the node says, "examples", "steps", "bytes" of the
reply, and "peak-mib" of the first step, 0.0 where it was not measured.
"""


class WatchedGrid(LocalGrid):
    """own: node config of each partition, `forward-ms` in each. In the last round all clients measure their first step,
    and not one alone.
    """

    def __init__(self, clients: int, run_config: Mapping[str, Scalar], own: Sequence[Mapping[str, Scalar]]) -> None:
        super().__init__(clients, run_config, own=own)
        self.work: list[Work] = []
        self._last = run_config["num-server-rounds"]

    def _deliver(self, message: Message) -> Message | None:
        if message.metadata.message_type == TRAIN:
            task: Any = message.content["config"]
            task["measure"] = task["measure"] or task["round"] == self._last
        reply = super()._deliver(message)
        if reply is not None:
            self.work.append(self._done(message, reply))
        return reply

    def _done(self, message: Message, reply: Message) -> Work:
        node = self.contexts[message.metadata.dst_node_id].node_config
        found = {"round": int(message.metadata.group_id or 0), "partition": int(node["partition-id"])}
        if reason := refusal_reason(reply):
            return found | {"refused": reason}
        if message.metadata.message_type == INTRODUCE:
            return found | {"rows": Introduction.from_message(reply).examples}
        if message.metadata.message_type != TRAIN:
            return found
        task, done = Task.from_message(message), TrainReply.from_message(reply, {})
        return found | {
            "gradient": task.gradient,
            "units": len(task.units),
            "forwards": done.forwards,
            "s": done.seconds,
            "box-s": done.forwards * float(node["forward-ms"]) / 1e3,
            "examples": done.examples,
            "steps": done.steps,
            "bytes": size_bytes(reply),
            "peak-mib": done.peak_mib,
        }


def slowest_s(work: Sequence[Work]) -> dict[int, float]:
    """Round -> seconds that the slowest of these clients computes, which is its passes at the speed that the node
    states. The way there and back, and evaluation, take none.
    """
    found: dict[int, float] = {}
    for done in work:
        if "box-s" in done:
            found[done["round"]] = max(done["box-s"], found.get(done["round"], 0.0))
    return found


def simulated(work: Sequence[Work], until: int) -> float:
    """Seconds to the end of round `until`, each as long as its slowest client."""
    return sum(seconds for round_, seconds in slowest_s(work).items() if round_ <= until)
