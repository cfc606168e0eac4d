"""Everything that travels between server and clients. No other file builds or reads message content.

downlink  "arrays": adapter tensors  "update": if needed  "config": round, client, units, fingerprint, flags
uplink    "arrays": values, gradients or nothing       "metrics": loss, counts, slopes    or "refusal": a sentence
"""

import math
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from spry_app.errors import SpryError

INTRODUCE = "query.introduce"
TRAIN = "train"
EVALUATE = "evaluate"

Tensors = dict[str, torch.Tensor]
T = TypeVar("T")


class MalformedReply(Exception):
    """A reply that cannot be used; the sentence says why."""


@dataclass(frozen=True)
class Task:
    """What the server asks of one node: to train `units`, or (message type EVALUATE) to score `tensors`.

    round: from 1. client: position among this round's clients, part of the seed. tensors: every trainable tensor
    (fp32). fingerprint: of the base model the server has. evaluate: also score the held-out rows after training.
    measure: also measure the peak memory of the first step. update: how the last round changed the tensors of `units`,
    where the method chooses directions by it; else empty.
    """

    round: int
    client: int
    tensors: Tensors
    units: tuple[str, ...]
    fingerprint: str
    evaluate: bool = False
    measure: bool = False
    update: Tensors = field(default_factory=dict)

    def to_message(self, node: int, message_type: str = TRAIN) -> Message:
        config = ConfigRecord(
            {
                "round": self.round,
                "client": self.client,
                "units": list(self.units),
                "fingerprint": self.fingerprint,
                "evaluate": self.evaluate,
                "measure": self.measure,
            }
        )
        content = RecordDict({"arrays": _arrays(self.tensors), "config": config})
        if self.update:
            content["update"] = _arrays(self.update)
        return Message(content=content, dst_node_id=node, message_type=message_type, group_id=str(self.round))

    @classmethod
    def from_message(cls, message: Message) -> Self:
        config = _Record(message, "config")
        return cls(
            round=config.get("round", int),
            client=config.get("client", int),
            tensors=_tensors(message),
            units=tuple(config.get("units", list)),
            fingerprint=config.get("fingerprint", str),
            evaluate=config.get("evaluate", bool),
            measure=config.get("measure", bool),
            update=_tensors(message, "update") if "update" in message.content else {},
        )


@dataclass(frozen=True)
class Score:
    """Sums over some rows: mean loss = loss / examples, accuracy = correct / examples."""

    loss: float
    correct: int
    examples: int

    def __add__(self, other: "Score") -> "Score":
        return Score(self.loss + other.loss, self.correct + other.correct, self.examples + other.examples)

    def to_message(self, task: Message) -> Message:
        return _reply(task, {}, _score_metrics(self))

    @classmethod
    def from_message(cls, message: Message) -> Self:
        """Raises MalformedReply."""
        metrics = _Record(message, "metrics")
        score = cls(metrics.get("loss", float), metrics.get("correct", int), metrics.get("heldout", int))
        if not (0 <= score.correct <= score.examples and math.isfinite(score.loss)):
            raise MalformedReply(f"an impossible score: {score.correct} of {score.examples}, loss {score.loss}")
        return score


@dataclass(frozen=True)
class TrainReply:
    """What a client made of its task.

    tensors: its units' new values (reply "weights") or gradient (reply "gradient"), or those alone whose gradient is
    exact. slopes: K numbers for each local step (reply "slopes"), else empty. loss: mean over the trained batches.
    examples: that were trained on. forwards: what that took, in passes of one example through the model. personal:
    score of the trained model on the client's held-out rows, if asked for. peak_mib: of the first step; 0.0 if not
    measured.
    """

    tensors: Tensors
    slopes: tuple[tuple[float, ...], ...]
    loss: float
    examples: int
    seconds: float
    forwards: float
    peak_mib: float = 0.0
    personal: Score | None = None

    def to_message(self, task: Message) -> Message:
        metrics: dict[str, int | float | list[int] | list[float]] = {
            "train-loss": self.loss,
            "num-examples": self.examples,
            "seconds": self.seconds,
            "forwards": self.forwards,
            "peak-mib": self.peak_mib,
            "steps": len(self.slopes),
            "slopes": [slope for step in self.slopes for slope in step],
        }
        if self.personal is not None:
            metrics |= _score_metrics(self.personal)
        return _reply(task, self.tensors, metrics)

    @classmethod
    def from_message(cls, message: Message) -> Self:
        """Raises MalformedReply where a record or a number is missing or of another kind."""
        metrics = _Record(message, "metrics")
        return cls(
            tensors=_tensors(message),
            slopes=_rows(metrics.get("slopes", list), metrics.get("steps", int)),
            loss=metrics.get("train-loss", float),
            examples=metrics.get("num-examples", int),
            seconds=metrics.get("seconds", float),
            forwards=metrics.get("forwards", float),
            peak_mib=metrics.get("peak-mib", float),
            personal=Score.from_message(message) if "correct" in metrics else None,
        )


@dataclass(frozen=True)
class Introduction:
    """What a node says of itself before it is given work.

    partition: its number among the nodes, -1 if it has none. fingerprint: of its base model. examples, heldout: rows.
    memory_mib: what a training step may take on it, 0.0 if it does not say.
    """

    partition: int
    fingerprint: str
    examples: int
    heldout: int
    memory_mib: float = 0.0

    def to_message(self, task: Message) -> Message:
        config = ConfigRecord(
            {
                "partition": self.partition,
                "fingerprint": self.fingerprint,
                "examples": self.examples,
                "heldout": self.heldout,
                "memory-mib": self.memory_mib,
            }
        )
        return Message(content=RecordDict({"introduction": config}), reply_to=task)

    @classmethod
    def from_message(cls, message: Message) -> Self:
        """Raises MalformedReply."""
        config = _Record(message, "introduction")
        memory_mib = config.get("memory-mib", float)
        if not 0 <= memory_mib < math.inf:
            raise MalformedReply(f"an impossible memory: {memory_mib} MiB")
        return cls(
            partition=config.get("partition", int),
            fingerprint=config.get("fingerprint", str),
            examples=config.get("examples", int),
            heldout=config.get("heldout", int),
            memory_mib=memory_mib,
        )


def introduction_request(node: int, fingerprint: str) -> Message:
    """Ask a node to load its model and data, test itself, and say what it has."""
    content = RecordDict({"config": ConfigRecord({"fingerprint": fingerprint})})
    return Message(content=content, dst_node_id=node, message_type=INTRODUCE)


def expected_fingerprint(message: Message) -> str:
    """The base model that the server has, from any message of its."""
    return _Record(message, "config").get("fingerprint", str)


def refusal(task: Message, reason: SpryError) -> Message:
    """A client's answer when the user's input stops it; the server shows the sentence."""
    return Message(content=RecordDict({"refusal": ConfigRecord({"reason": str(reason)})}), reply_to=task)


def refusal_reason(message: Message) -> str:
    """Why the client refused; empty if it did not."""
    record = message.content.get("refusal")
    if record is None:
        return ""
    return str(record.get("reason", "")) or "it gave no reason"


def to_arrays(tensors: Tensors) -> ArrayRecord:
    """As Flower's Strategy.start passes them between its methods."""
    return _arrays(tensors)


def from_arrays(arrays: ArrayRecord) -> Tensors:
    """The tensors by name. Raises MalformedReply where their bytes are not tensors."""
    try:
        return dict(arrays.to_torch_state_dict())
    except (TypeError, ValueError, EOFError) as error:
        raise MalformedReply(f"unreadable arrays ({error})") from None


def size_bytes(message: Message) -> int:
    """Bytes of the content as serialised for the wire."""
    return 0 if message.has_error() else recorddict_to_proto(message.content).ByteSize()


def _arrays(tensors: Tensors) -> ArrayRecord:
    return ArrayRecord({name: value.contiguous() for name, value in tensors.items()})


def _tensors(message: Message, name: str = "arrays") -> Tensors:
    record = message.content.get(name)
    if not isinstance(record, ArrayRecord):
        raise MalformedReply(f"the {name} are missing")
    return from_arrays(record)


class _Record:
    """A record of a message, read by key and kind."""

    def __init__(self, message: Message, name: str) -> None:
        self._name, self._record = name, message.content.get(name)
        if self._record is None:
            raise MalformedReply(f"the {name} are missing")

    def __contains__(self, key: str) -> bool:
        return self._record is not None and key in self._record

    def get(self, key: str, kind: type[T]) -> T:
        value: Any = self._record.get(key) if self._record is not None else None
        if type(value) is int and kind is float:
            value = float(value)
        if type(value) is not kind:
            raise MalformedReply(f"{key} in the {self._name} is {str(value)[:40]!r}, not of type {kind.__name__}")
        return value


def _rows(flat: list[float], rows: int) -> tuple[tuple[float, ...], ...]:
    if not ((0 < rows <= len(flat) and len(flat) % rows == 0) or rows == len(flat) == 0):
        raise MalformedReply(f"{len(flat)} slopes do not divide into {rows} steps")
    width = len(flat) // max(1, rows)
    return tuple(tuple(map(float, flat[row * width : (row + 1) * width])) for row in range(rows))


def _score_metrics(score: Score) -> dict[str, int | float | list[int] | list[float]]:
    return {"loss": score.loss, "correct": score.correct, "heldout": score.examples}


def _reply(task: Message, tensors: Tensors, metrics: dict[str, int | float | list[int] | list[float]]) -> Message:
    content = RecordDict({"arrays": _arrays(tensors), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=task)
