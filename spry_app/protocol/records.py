"""Flower's records as named tensors and checked numbers, both ways. What they mean is not known here."""

from typing import Any, TypeVar

import torch
from flwr.app import ArrayRecord, Message
from flwr.common.serde import recorddict_to_proto

Tensors = dict[str, torch.Tensor]
T = TypeVar("T")


class MalformedReply(Exception):
    """A reply that cannot be used; the sentence says why."""


def to_arrays(tensors: Tensors) -> ArrayRecord:
    """By name, as Flower carries them."""
    return ArrayRecord({name: value.contiguous() for name, value in tensors.items()})


def from_arrays(arrays: ArrayRecord) -> Tensors:
    """The tensors by name. Raises MalformedReply where their bytes are not tensors."""
    try:
        return dict(arrays.to_torch_state_dict())
    except (TypeError, ValueError, EOFError) as error:
        raise MalformedReply(f"unreadable arrays ({error})") from None


def size_bytes(message: Message) -> int:
    """Bytes of the content as serialised for the wire."""
    return 0 if message.has_error() else recorddict_to_proto(message.content).ByteSize()


def tensors_in(message: Message, name: str = "arrays") -> Tensors:
    """Those of one record. Raises MalformedReply."""
    record = message.content.get(name)
    if not isinstance(record, ArrayRecord):
        raise MalformedReply(f"the {name} are missing")
    return from_arrays(record)


class Record:
    """A record of a message, read by key and kind."""

    def __init__(self, message: Message, name: str) -> None:
        self._name, self._record = name, message.content.get(name)
        if self._record is None:
            raise MalformedReply(f"the {name} are missing")

    def __contains__(self, key: str) -> bool:
        return self._record is not None and key in self._record

    def get(self, key: str, kind: type[T]) -> T:
        """Raises MalformedReply where there is none of that kind."""
        value: Any = self._record.get(key) if self._record is not None else None
        if type(value) is int and kind is float:
            value = float(value)
        if type(value) is not kind:
            raise MalformedReply(f"{key} in the {self._name} is {str(value)[:40]!r}, not of type {kind.__name__}")
        return value
