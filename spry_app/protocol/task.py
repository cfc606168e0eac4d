"""What the server asks of a node. What it answers is in replies.py."""

import secrets
from dataclasses import dataclass, field
from typing import Self

from flwr.app import ConfigRecord, Message, RecordDict

from spry_app.protocol.records import MalformedReply, Record, Tensors, content_of, tensors_in, to_arrays
from spry_app.slope_log import Entry, pack, unpack

INTRODUCE = "query.introduce"
TRAIN = "train"
EVALUATE = "evaluate"


@dataclass(frozen=True)
class CatchUp:
    """How a node that keeps the tensors of earlier rounds comes to those of this one.

    since: round after which the node must hold them at least. entries: what was measured in the rounds that followed.
    digest: of all tensors in the end. moments: of the server's optimizer, with all tensors, in place of entries; None
    where the node goes on from what it holds.
    """

    since: int
    digest: str
    entries: tuple[Entry, ...] = ()
    moments: Tensors | None = None


@dataclass(frozen=True)
class Task:
    """What the server asks of one node: to train `units`, or (message type EVALUATE) to score `tensors`.

    round: from 1. client: position among this round's clients, which decides the order of its rows. number, sharing,
    directions: which directions it takes, and how many a batch (methods.replay.Seat). steps: at most so many local
    ones; 0 for all that there are. gradient: name of the one that it takes, where that is not the method's
    (Method.taking). tensors: every trainable tensor (fp32), or with `catch_up` those alone that no scalar stands for.
    fingerprint: of the base model the server has. evaluate: also score the held-out rows after training. measure: also
    measure the peak memory of the first step. update: how the last round changed the tensors of `units`, where the
    method chooses directions by it; else empty. deadline_s: seconds after which no local step is to end, from when the
    node has read the task; 0.0 for none.
    """

    round: int
    client: int
    tensors: Tensors
    units: tuple[str, ...]
    fingerprint: str
    number: int = 0
    sharing: int = 0
    directions: int = 1
    gradient: str = ""
    evaluate: bool = False
    measure: bool = False
    update: Tensors = field(default_factory=dict)
    catch_up: CatchUp | None = None
    deadline_s: float = 0.0
    steps: int = 0

    def to_message(self, node: int, message_type: str = TRAIN) -> Message:
        content = self.content()
        return Message(content=content, dst_node_id=node, message_type=message_type, group_id=str(self.round))

    def content(self) -> RecordDict:
        """Of its message."""
        config = ConfigRecord(
            {
                "round": self.round,
                "client": self.client,
                "number": self.number,
                "sharing": self.sharing,
                "directions": self.directions,
                "steps": self.steps,
                "gradient": self.gradient,
                "units": list(self.units),
                "fingerprint": self.fingerprint,
                "evaluate": self.evaluate,
                "measure": self.measure,
                "deadline-s": self.deadline_s,
                "nonce": _nonce(),
            }
        )
        content = RecordDict({"arrays": to_arrays(self.tensors), "config": config})
        if self.update:
            content["update"] = to_arrays(self.update)
        if self.catch_up is not None:
            _write(self.catch_up, content)
        return content

    @classmethod
    def from_message(cls, message: Message) -> Self:
        """Raises MalformedReply."""
        config = Record(message, "config")
        return cls(
            round=config.get("round", int),
            client=config.get("client", int),
            number=config.get("number", int),
            sharing=config.get("sharing", int),
            directions=config.get("directions", int),
            gradient=config.word("gradient"),
            tensors=tensors_in(message),
            units=tuple(config.list_of("units", str)),
            fingerprint=config.get("fingerprint", str),
            evaluate=config.get("evaluate", bool),
            measure=config.get("measure", bool),
            update=tensors_in(message, "update") if "update" in message.content else {},
            catch_up=_read(message) if "log" in message.content else None,
            deadline_s=config.get("deadline-s", float),
            steps=config.get("steps", int),
        )


def introduction_request(node: int, fingerprint: str) -> Message:
    """Ask a node to load its model and data, test itself, and say what it has."""
    content = RecordDict({"config": ConfigRecord({"fingerprint": fingerprint, "nonce": _nonce()})})
    return Message(content=content, dst_node_id=node, message_type=INTRODUCE)


def frame_in(message: Message) -> Tensors | None:
    """What `with_frame` has put there."""
    return tensors_in(message, "frame") if "frame" in content_of(message) else None


def with_frame(message: Message, frame: Tensors) -> Message:
    """With what a node cannot compute of the adapter by itself; it keeps that for the run."""
    message.content["frame"] = to_arrays(frame)
    return message


def expected_fingerprint(message: Message) -> str:
    """The base model that the server has, from any message of its."""
    return Record(message, "config").get("fingerprint", str)


def _nonce() -> bytes:
    """Flower names a message by the hash of it: this makes that a secret of the server and of the node it is sent to,
    so that nobody else can answer it (server.letters).
    """
    return secrets.token_bytes(16)


def _write(catch_up: CatchUp, content: RecordDict) -> None:
    counts, slopes = pack(catch_up.entries)
    content["log"] = ConfigRecord(
        {"since": catch_up.since, "digest": catch_up.digest, "counts": counts, "slopes": slopes}
    )
    if catch_up.moments is not None:
        content["moments"] = to_arrays(catch_up.moments)


def _read(message: Message) -> CatchUp:
    log = Record(message, "log")
    try:
        entries = unpack(log.list_of("counts", int), log.list_of("slopes", float, int))
    except ValueError as error:
        raise MalformedReply(f"an unreadable log ({error})") from None
    return CatchUp(
        since=log.get("since", int),
        digest=log.get("digest", str),
        entries=entries,
        moments=tensors_in(message, "moments") if "moments" in message.content else None,
    )
