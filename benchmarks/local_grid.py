"""A federation in this process: Flower's Grid over the real ClientApp, every message through protobuf both ways.
Nothing is measured or decided here.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.supercore.task_identity import TaskIdentity

from client_app import app as client_app
from spry_app.config import Scalar

Tamper = Callable[[int, Message], Message | None]


class LocalGrid:
    """Flower's Grid as a strategy sees it. `tamper(partition, reply)` may change a reply or lose it (None).

    node_ids: of the partitions, in their order. own: what each partition says in its node config besides.
    """

    def __init__(
        self,
        clients: int,
        run_config: Mapping[str, Scalar],
        node_ids: Sequence[int] = (),
        tamper: Tamper | None = None,
        own: Sequence[Mapping[str, Scalar]] = (),
    ) -> None:
        self.tamper = tamper
        self.contexts: dict[int, Context] = {}
        for partition, node in enumerate(node_ids or range(100, 100 + 7 * clients, 7)):
            self.contexts[node] = Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": partition, "num-partitions": clients, **(own[partition] if own else {})},
                state=RecordDict(),
                run_config=dict(run_config),
            )
        self._ids = itertools.count()

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, connected from the start."""
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], timeout: float | None = None) -> Iterable[Message]:
        """Replies in an order that is not the order of sending, as over a network."""
        replies = [self._deliver(message) for message in messages]
        return [reply for reply in reversed(replies) if reply is not None]

    def _deliver(self, message: Message) -> Message | None:
        message.metadata.__dict__["_message_id"] = f"message-{next(self._ids)}"
        context = self.contexts[message.metadata.dst_node_id]
        reply = client_app(message_from_proto(message_to_proto(message)), context)
        reply = message_from_proto(message_to_proto(reply))
        partition = int(context.node_config["partition-id"])
        return self.tamper(partition, reply) if self.tamper and message.metadata.message_type == "train" else reply


def identify() -> None:
    """Flower stamps each new Message with the identity of the running task; outside a run there is none."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
