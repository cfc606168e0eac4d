"""Which of the nodes that were asked a reply is of, and which have not answered. What they say is not looked at."""

from collections.abc import Sequence

from flwr.app import Message


class Awaited:
    """The answers to `messages`, of which Flower sets the ids when it sends them.

    What it makes in place of a node that is gone comes from the SuperLink, as no node's.
    """

    def __init__(self, messages: Sequence[Message] = ()) -> None:
        self._asked = [message.metadata for message in messages]
        self._silent = {asked.dst_node_id for asked in self._asked}

    def sender(self, reply: Message) -> int:
        """The node that has answered, or failed."""
        node = reply.metadata.src_node_id
        if reply.has_error():
            asked = {each.message_id: each.dst_node_id for each in self._asked}
            node = asked.get(reply.metadata.reply_to_message_id, node)
        self._silent.discard(node)
        return node

    def given_up(self) -> list[int]:
        """Nodes of which no reply has been seen; they are not awaited any more."""
        silent, self._silent = sorted(self._silent), set()
        return silent
