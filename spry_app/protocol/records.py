"""Flower's records as named tensors and checked numbers, both ways. What they mean is not known here.

Nothing is allocated because a message says so: only what really came is read, and no reader that could run code or
unpack anything (NumPy's own takes archives, and makes room for whatever shape a header claims) is asked to.
"""

import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.serde import recorddict_to_proto
from google.protobuf.message import EncodeError

from spry_app.errors import SpryError
from spry_app.slope_log import LARGEST

Tensors = dict[str, torch.Tensor]
T = TypeVar("T")

MOST_SAID = 1000
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([<|]..)', 'fortran_order': False, 'shape': \(([\d, ]{0,200})\), \} *\n",
    re.DOTALL,
)
"""What numpy.save writes before a plain array in C order: https://numpy.org/neps/nep-0001-npy-format.html"""
_WORD, _MOST_WORDS = re.compile(r"[a-z][a-z0-9-]{0,63}"), 64
_FORMATS = {np.dtype(name).str.encode(): np.dtype(name) for name in ("f2", "f4", "f8", "i4", "i8", "u1")}


class MalformedReply(SpryError):
    """A message that cannot be used; the sentence says why."""


def to_arrays(tensors: Tensors) -> ArrayRecord:
    """By name, as Flower carries them."""
    return ArrayRecord({name: value.contiguous() for name, value in tensors.items()})


def from_arrays(arrays: ArrayRecord) -> Tensors:
    """The tensors by name. Raises MalformedReply where their bytes are not tensors."""
    return {name: _tensor(array) for name, array in arrays.items()}


def _tensor(array: Array) -> torch.Tensor:
    header = _HEADER.match(array.data)
    kind = _FORMATS.get(header[2]) if header else None
    if header is None or kind is None or header.end() != 10 + int.from_bytes(header[1], "little"):
        raise MalformedReply(f"unreadable arrays (one begins with {array.data[:80]!r})")
    try:
        shape = tuple(int(part) for part in header[3].split(b",") if part.strip())
        if math.prod(shape) * kind.itemsize != len(array.data) - header.end():
            raise ValueError(f"{len(array.data) - header.end()} bytes are no {kind} of shape {shape}")
        return torch.from_numpy(np.ndarray(shape, kind, array.data, header.end()).copy())
    except ValueError as error:
        raise MalformedReply(f"unreadable arrays ({error})") from None


def mismatch(tensors: Tensors, wanted: Mapping[str, torch.Tensor]) -> str:
    """Why `tensors` are not those `wanted`, in names, shapes, formats, or for a number that cannot be computed with;
    empty if they are.
    """
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        return f"tensors missing: {_names(missing)}; not asked for: {_names(extra)}"
    for name, value in tensors.items():
        if value.shape != wanted[name].shape or value.dtype != wanted[name].dtype:
            got, want = f"{tuple(value.shape)} {value.dtype}", f"{tuple(wanted[name].shape)} {wanted[name].dtype}"
            return f"{name} is {got}, not {want}"
        if not torch.isfinite(value).all():
            return f"{name} has a number that is not finite"
        if value.numel() and float(value.abs().max()) > LARGEST:
            return f"{name} has a number beyond {LARGEST:g}"
    return ""


def _names(names: list[str]) -> str:
    if not names:
        return "none"
    return f"{[name[:200] for name in names[:4]]}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def said(text: str) -> str:
    """What a node says, fit for a log: in one line, without what a terminal would obey, of bounded length."""
    shown = text if len(text) <= MOST_SAID else f"{text[:MOST_SAID]} ..."
    return "".join(letter if letter.isprintable() else " " for letter in shown)


def content_of(message: Message) -> RecordDict:
    """Raises MalformedReply where there is none."""
    if not message.has_content():
        raise MalformedReply("it is empty")
    return message.content


def size_bytes(message: Message) -> int:
    """Bytes of the content as serialised for the wire. Raises MalformedReply where it could not have come over one."""
    return 0 if message.has_error() else content_bytes(content_of(message))


def content_bytes(content: RecordDict) -> int:
    """Of what a message holds; see size_bytes."""
    try:
        return int(recorddict_to_proto(content).ByteSize())
    except (TypeError, ValueError, EncodeError) as error:
        raise MalformedReply(f"it cannot be serialised ({error})") from None


def tensors_in(message: Message, name: str = "arrays") -> Tensors:
    """Those of one record. Raises MalformedReply."""
    record = content_of(message).get(name)
    if not isinstance(record, ArrayRecord):
        raise MalformedReply(f"the {name} are missing")
    return from_arrays(record)


class Record:
    """A record of a message, read by key and kind."""

    def __init__(self, message: Message, name: str) -> None:
        self._name, self._record = name, content_of(message).get(name)
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
            raise MalformedReply(f"{key} in the {self._name} is {_shown(value)}, not of type {kind.__name__}")
        return value

    def word(self, key: str) -> str:
        """As a table of ours may have it for a row, or nothing. Raises MalformedReply."""
        return _word(self.get(key, str), key)

    def words(self, key: str) -> tuple[str, ...]:
        """Some of a table's. Raises MalformedReply where it is something else, or more than any table has."""
        values = self.list_of(key, str)
        if len(values) > _MOST_WORDS:
            raise MalformedReply(f"{key} in the {self._name} is a list of {len(values)}")
        return tuple(_word(value, key) for value in values)

    def list_of(self, key: str, *kinds: type) -> list[Any]:
        """Raises MalformedReply where there is none, or it holds another kind."""
        values = self.get(key, list)
        if not all(type(value) in kinds for value in values):
            raise MalformedReply(f"{key} in the {self._name} is a list of something else than {kinds[0].__name__}")
        return values


def _word(value: str, key: str) -> str:
    if value and not _WORD.fullmatch(value):
        raise MalformedReply(f"{key} is {reprlib.repr(value)}, not a name")
    return value


def _shown(value: Any) -> str:
    """In a few letters, however large it is."""
    found = value.data if isinstance(value, Array) else value
    return f"{len(found)} bytes" if isinstance(found, bytes) else reprlib.repr(found)
