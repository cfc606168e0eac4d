"""Which node a reply comes from, the one that was sent the message which it answers, and which have not answered. What
they say is not read here.
"""

import functools
from collections.abc import Iterable

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID

from spry_app.protocol import MalformedReply


class Letters:
    """The messages that wait for a reply, each for one.

    What a message says of its own source is what its sender has written: Flower 1.41 compares that with nobody's key. A
    reply also names the message that it answers, by a hash which only the node knows that was sent it (protocol.task).
    """

    def __init__(self, messages: Iterable[Message] = ()) -> None:
        self._sent = [message.metadata for message in messages]  # Flower writes the ids into these when it sends
        self._answered: set[str] = set()

    @functools.cached_property
    def _asked(self) -> dict[str, int]:
        return {sent.message_id: sent.dst_node_id for sent in self._sent if sent.message_id}

    def sender(self, reply: Message) -> int:
        """The node. Raises MalformedReply where it was not asked, has answered, or speaks for another."""
        answers, says = reply.metadata.reply_to_message_id, reply.metadata.src_node_id
        if answers not in self._asked:
            raise MalformedReply("it was not asked")
        node = self._asked[answers]
        # That a node is not to be reached is said by the SuperLink in its place.
        if says != node and not (says == SUPERLINK_NODE_ID and reply.has_error()):
            raise MalformedReply(f"it was not asked: node {node} was, in whose place it answers")
        if answers in self._answered:
            raise MalformedReply("it answered before")
        self._answered.add(answers)
        return node

    def waiting(self) -> dict[str, int]:
        """Those of which no reply has come -> the node."""
        return {letter: node for letter, node in self._asked.items() if letter not in self._answered}

    def rest(self) -> "Letters":
        """Those of which no reply has come, to be waited for by themselves; here they do not wait any more."""
        rest = Letters()
        rest._sent = [sent for sent in self._sent if sent.message_id not in self._answered]
        self._answered |= {sent.message_id for sent in rest._sent}
        return rest

    def given_up(self) -> list[int]:
        """The nodes of which no reply has come; their letters do not wait any more."""
        return sorted(sent.dst_node_id for sent in self.rest()._sent)
