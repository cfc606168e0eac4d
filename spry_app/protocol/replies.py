"""What a node answers. What it was asked is in task.py."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from spry_app.errors import OutOfMemory, SpryError
from spry_app.protocol.device import Device
from spry_app.protocol.records import MalformedReply, Record, Tensors, content_of, tensors_in, to_arrays
from spry_app.slope_log import LARGEST

MOST_EXAMPLES = 2**31
"""Rows that a node may say it has."""
Bounds = Mapping[str, tuple[float, float]]
"""Name of each sum that a score must have -> the least and the most that one example adds to it."""
_LONGEST_DIGEST = 256
_HELDOUT = "heldout"
"""Over the wire, the examples of a score: those of the training have that name."""


@dataclass(frozen=True)
class Score:
    """Sums over some rows. Which there are besides the loss, and what they are sums of, the task says; over the wire
    they go by their names.
    """

    loss: float
    sums: Mapping[str, float]
    examples: int

    def __add__(self, other: "Score") -> "Score":
        """Of both; a sum that only one of them has counts as it is."""
        names = self.sums.keys() | other.sums.keys()
        both = {name: self.sums.get(name, 0) + other.sums.get(name, 0) for name in sorted(names)}
        return Score(self.loss + other.loss, both, self.examples + other.examples)

    def numbers(self) -> dict[str, float]:
        """All of them by name: "loss", "examples", and the others."""
        return {**self.sums, "loss": self.loss, "examples": self.examples}

    def to_message(self, task: Message) -> Message:
        return Message(content=_content({}, _score_metrics(self)), reply_to=task)

    @classmethod
    def from_message(cls, message: Message, bounds: Bounds) -> Self:
        """Raises MalformedReply."""
        metrics = Record(message, "metrics")
        sums = {name: metrics.get(name, float) for name in bounds}
        score = cls(metrics.get("loss", float), sums, metrics.get(_HELDOUT, int))
        sound = 0 <= score.examples <= MOST_EXAMPLES and abs(score.loss) <= LARGEST * score.examples
        within = (
            least * score.examples <= sums[name] <= most * score.examples for name, (least, most) in bounds.items()
        )
        if not (sound and all(within)):
            shown = ", ".join(f"{name} {value:g}" for name, value in sums.items())
            raise MalformedReply(f"an impossible score: {shown} of {score.examples}, loss {score.loss}")
        return score


@dataclass(frozen=True)
class TrainReply:
    """What a client made of its task.

    tensors: its units' new values (reply "weights") or gradient (reply "gradient"), or those alone whose gradient is
    exact. slopes: K numbers for each local step (reply "slopes"), else empty. loss: mean over the trained batches.
    examples: that were trained on. forwards: what that took, in passes of one example through the model. personal:
    score of the trained model on the client's held-out rows, if asked for. peak_mib: of the first step; 0.0 if not
    measured. steps: that were done, of the `steps_asked` that all of it is on this node, where a Task may want fewer.
    """

    tensors: Tensors
    slopes: tuple[tuple[float, ...], ...]
    loss: float
    examples: int
    seconds: float
    forwards: float
    peak_mib: float = 0.0
    personal: Score | None = None
    steps: int = 1
    steps_asked: int = 1

    @property
    def partial(self) -> bool:
        """Whether the deadline came before the last step."""
        return self.steps < self.steps_asked

    def to_message(self, task: Message) -> Message:
        return Message(content=self.content(), reply_to=task)

    def content(self) -> RecordDict:
        """Of its message."""
        metrics: dict[str, int | float | list[int] | list[float]] = {
            "train-loss": self.loss,
            "num-examples": self.examples,
            "seconds": self.seconds,
            "forwards": self.forwards,
            "peak-mib": self.peak_mib,
            "steps": self.steps,
            "steps-asked": self.steps_asked,
            "slopes": [slope for step in self.slopes for slope in step],
        }
        if self.personal is not None:
            metrics |= _score_metrics(self.personal)
        return _content(self.tensors, metrics)

    @classmethod
    def from_message(cls, message: Message, bounds: Bounds) -> Self:
        """Raises MalformedReply where a record or a number is missing or of another kind."""
        metrics = Record(message, "metrics")
        scored = any(name in metrics for name in (*bounds, _HELDOUT))
        return cls(
            tensors=tensors_in(message),
            slopes=_rows(metrics.list_of("slopes", float, int), metrics.get("steps", int)),
            loss=metrics.get("train-loss", float),
            examples=metrics.get("num-examples", int),
            seconds=metrics.get("seconds", float),
            forwards=metrics.get("forwards", float),
            peak_mib=metrics.get("peak-mib", float),
            personal=Score.from_message(message, bounds) if scored else None,
            steps=metrics.get("steps", int),
            steps_asked=metrics.get("steps-asked", int),
        )


@dataclass(frozen=True)
class Introduction:
    """What a node says of itself before it is given work.

    partition: its number among the nodes, -1 if it has none. fingerprint: of its base model. examples, heldout: rows.
    digest: of the tensors that it starts from. memory_mib: what a training step may take on it, 0.0 if it does not say.
    gradients: names of those that it can take for a task. device: its machine.
    """

    partition: int
    fingerprint: str
    examples: int
    heldout: int
    digest: str
    memory_mib: float = 0.0
    gradients: tuple[str, ...] = ()
    device: Device = field(default_factory=Device)

    def to_message(self, task: Message) -> Message:
        config = ConfigRecord(
            {
                "partition": self.partition,
                "fingerprint": self.fingerprint,
                "examples": self.examples,
                "heldout": self.heldout,
                "digest": self.digest,
                "memory-mib": self.memory_mib,
                "gradients": list(self.gradients),
                **self.device.stated(),
            }
        )
        return Message(content=RecordDict({"introduction": config}), reply_to=task)

    @classmethod
    def from_message(cls, message: Message) -> Self:
        """Raises MalformedReply."""
        config = Record(message, "introduction")
        memory_mib = config.get("memory-mib", float)
        if not 0 <= memory_mib < math.inf:
            raise MalformedReply(f"an impossible memory: {memory_mib} MiB")
        found = cls(
            partition=config.get("partition", int),
            fingerprint=config.get("fingerprint", str),
            examples=config.get("examples", int),
            heldout=config.get("heldout", int),
            digest=config.get("digest", str),
            memory_mib=memory_mib,
            gradients=config.words("gradients"),
            device=Device.of(config),
        )
        if not (0 <= found.examples <= MOST_EXAMPLES and 0 <= found.heldout <= MOST_EXAMPLES):
            raise MalformedReply(f"impossible rows: {found.examples}, and {found.heldout} held out")
        if max(len(found.fingerprint), len(found.digest)) > _LONGEST_DIGEST:
            raise MalformedReply(f"a fingerprint or digest of more than {_LONGEST_DIGEST} characters")
        return found


def refusal(task: Message, reason: SpryError) -> Message:
    """A client's answer when the user's input stops it; the server shows the sentence."""
    record = ConfigRecord({"reason": str(reason), "out-of-memory": isinstance(reason, OutOfMemory)})
    return Message(content=RecordDict({"refusal": record}), reply_to=task)


def lacks_memory(message: Message) -> bool:
    """Whether the client refused because it was out of memory."""
    record = None if message.has_error() else content_of(message).get("refusal")
    return record is not None and record.get("out-of-memory") is True


def error_reason(message: Message) -> str:
    """What Flower says where there is no reply; empty where there is one."""
    return message.error.reason or f"Flower error {message.error.code}" if message.has_error() else ""


def refusal_reason(message: Message) -> str:
    """Why the client refused; empty if it did not. Raises MalformedReply."""
    record = content_of(message).get("refusal")
    if record is None:
        return ""
    reason = record.get("reason")
    return reason if isinstance(reason, str) and reason else "it gave no reason"


def _rows(flat: list[float], rows: int) -> tuple[tuple[float, ...], ...]:
    if not flat:
        return ()
    if not (0 < rows <= len(flat) and len(flat) % rows == 0):
        raise MalformedReply(f"{len(flat)} slopes do not divide into {rows} steps")
    width = len(flat) // rows
    return tuple(tuple(map(float, flat[row * width : (row + 1) * width])) for row in range(rows))


def _score_metrics(score: Score) -> dict[str, int | float | list[int] | list[float]]:
    return {"loss": score.loss, **score.sums, _HELDOUT: score.examples}


def _content(tensors: Tensors, metrics: dict[str, int | float | list[int] | list[float]]) -> RecordDict:
    return RecordDict({"arrays": to_arrays(tensors), "metrics": MetricRecord(metrics)})
