"""Messages that nobody should send, made of honest ones: one number names one of them. What may become of them is
decided in test_fuzz_messages.py.
"""

import io
import math
import pickle
import random
import re
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
    get_object_children_ids_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

INTS = (0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**64 - 1, -(2**31), -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e308, -1e308, 1e38, 1e13, -1e13, 5e-324)
TEXTS = ("", "x", "head", "\x1b[31m\n2026 INFO round 1/1", "ü\u202e", "9" * 5000, "not.yours", "e" * 100_000)
SHAPES = ("()", "(3,)", "(0,)", "(1000000000000,)", "(100000, 100000, 100)", "(-1,)", "(0, 9999999999999)", "(1, 1)")
SHAPES += (
    "(9223372036854775807, 4)",
    "(1e9,)",
    "(" + "9" * 150 + ",)",
    "(True,)",
    "[2]",
    "(" * 300,
    "(" + "1," * 90 + ")",
)
FORMATS = ("<f4", "<f8", "<f2", ">f4", "|O", "<U0", "<U100000", "|V0", "|V9", "|S1", "<M8[s]", "<c8", "|b1", "<i8")


class NoMessage(Exception):
    """Flower itself cannot read it, so that it never gets to Spry."""


def npy(shape: str, kind: str, data: bytes, version: bytes = b"\x01\x00") -> bytes:
    """An .npy file whose header says so."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + data


def archive() -> bytes:
    """What numpy.savez writes: read by numpy.load too."""
    file = io.BytesIO()
    np.savez_compressed(file, x=np.zeros(10_000_000))
    return file.getvalue()


def broken_archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("x.npy", b"x")
    return file.getvalue()[:-9]


class Touch:
    """Unpickled, it calls this."""

    called = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return touch, ()


def touch() -> None:
    Touch.called = True


def object_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Touch()], dtype=object), allow_pickle=True)
    return file.getvalue()


PAYLOADS = (b"", b"x", pickle.dumps(Touch()), object_array(), archive(), broken_archive(), b"PK\x03\x04" + bytes(50))


def number(rng: random.Random) -> Any:
    """A number, or a list of some, as a MetricRecord takes it."""
    one = rng.choice([*INTS, *FLOATS, rng.randrange(100), rng.uniform(-9, 9)])
    if rng.random() < 0.6:
        return one
    return [one] * rng.choice([0, 1, 2, 3, 4, 5, 8, 1000])


def value(rng: random.Random) -> Any:
    """What a ConfigRecord takes."""
    one = rng.choice([number(rng), rng.choice(TEXTS), rng.random() < 0.5, rng.randbytes(rng.choice([0, 9, 9999]))])
    return one if isinstance(one, list) or rng.random() < 0.7 else [one] * rng.choice([1, 4])


def damaged(data: bytes, rng: random.Random) -> bytes:
    """With some bytes changed, lost, doubled or added."""
    at = rng.randrange(len(data) + 1)
    to = min(len(data), at + rng.choice([1, 1, 4, 64]))
    ways = (
        lambda: data[:at] + rng.randbytes(to - at) + data[to:],
        lambda: data[:at],
        lambda: data[:at] + data[to:],
        lambda: data[:to] + data[at:],
        lambda: data + rng.randbytes(rng.choice([1, 4, 4096])),
        lambda: data[:at] + bytes([(data[at] ^ (1 << rng.randrange(8))) if at < len(data) else 0]) + data[at + 1 :],
    )
    return rng.choice(ways)()


def array(old: Array, rng: random.Random) -> Array:
    """A bad one in place of `old`."""
    size = 4 * math.prod(old.shape)
    plain = np.frombuffer(old.data[-size:], "f4") if 0 < size <= len(old.data) else np.zeros(1, "f4")
    wild = plain.copy()
    with np.errstate(over="ignore"):
        wild[rng.randrange(len(wild))] = rng.choice([*FLOATS, 3e38])
    ways = (
        lambda: npy(rng.choice(SHAPES), rng.choice(FORMATS), old.data[-8:], rng.choice([b"\x01\x00", b"\x02\x00"])),
        lambda: npy(str(tuple(old.shape)), rng.choice(FORMATS), plain.tobytes()),
        lambda: npy(str(tuple(old.shape)), "<f4", wild.tobytes()),
        lambda: rng.choice(PAYLOADS),
        lambda: damaged(old.data, rng),
    )
    return Array(dtype=old.dtype, shape=old.shape, stype=rng.choice([old.stype, "torch"]), data=rng.choice(ways)())


def spoil_record(content: RecordDict, rng: random.Random) -> None:
    name = rng.choice([*content, "arrays", "metrics", "refusal", "log", "moments", "update", "frame"])
    record = content.get(name)
    if record is None or rng.random() < 0.1:
        fresh: tuple[Any, ...] = (
            ConfigRecord({rng.choice(["reason", *(record or ["x"])]): value(rng)}),
            MetricRecord({rng.choice(["reason", "loss"]): number(rng)}),
            ArrayRecord({"reason": Array(np.zeros(3, "f4"))}),
        )
        content.pop(name, None)
        content[name] = rng.choice(fresh)
    elif rng.random() < 0.03:
        del content[name]
    else:
        spoil_entry(record, rng)


def spoil_entry(record: Any, rng: random.Random) -> None:
    key = rng.choice([*record, "correct", "heldout", "loss"])
    if rng.random() < 0.08:
        record.pop(key, None)
    elif isinstance(record, ArrayRecord):
        old = record.get(key, Array(np.zeros((2, 2), "f4")))
        record[rng.choice([key, key, key, *TEXTS])] = array(old, rng)
    else:
        record[key] = number(rng) if isinstance(record, MetricRecord) else value(rng)
        if rng.random() < 0.01:
            record.update({f"{rng.random()}": 1 for _ in range(2000)})


def spoil_metadata(message: Message, others: Sequence[Message], rng: random.Random) -> None:
    """It speaks for another, answers another's message, or none."""
    other = rng.choice([*others, message]).metadata
    fields = {
        "_src_node_id": rng.choice([other.src_node_id, 0, 1, 99]),
        "_reply_to_message_id": rng.choice([other.reply_to_message_id, "", "message-99"]),
    }
    name = rng.choice(list(fields))
    message.metadata.__dict__[name] = fields[name]


def over_protobuf(content: RecordDict, rng: random.Random, harm: bool) -> RecordDict:
    """As a simulation carries it."""
    data = recorddict_to_proto(content).SerializeToString()
    return recorddict_from_proto(ProtoRecordDict.FromString(damaged(data, rng) if harm else data))


def over_objects(content: RecordDict, rng: random.Random, harm: bool) -> RecordDict:
    """As a SuperLink carries it: every record and array an object with a JSON or protobuf body."""
    objects = {name: found.deflate() for name, found in get_all_nested_objects(content).items()}
    if harm:
        name = rng.choice(list(objects))
        objects[name] = edited(objects[name], rng)
    found = inflate_object_from_contents(content.object_id, objects)
    assert isinstance(found, RecordDict)
    return found


def edited(content: bytes, rng: random.Random) -> bytes:
    """The object with another body, whose length its head tells."""
    kind = {c.__name__: c for c in (RecordDict, ArrayRecord, MetricRecord, ConfigRecord, Array)}.get(
        content.split(b" ")[0].decode()
    )
    if kind is None or (get_object_children_ids_from_object_content(content) and rng.random() < 0.3):
        return damaged(content, rng)
    body = get_object_body(content, kind)
    swaps = [(rb"\d+", b"9" * 30), (rb'"[a-z.]+"', b'"\\ud800"'), (rb"\[\d", b"[true"), (rb"float32", b"object")]
    pattern, text = rng.choice(swaps)
    fresh = re.sub(pattern, lambda _: text, body, count=1) if body.startswith(b"{") else damaged(body, rng)
    return content[: content.index(b"\x00") + 1].rsplit(b" ", 1)[0] + b" %d\x00" % len(fresh) + fresh


def bad(honest: Sequence[Message], seed: int) -> list[Message]:
    """One or two messages, the honest ones with one to three things wrong. Raises NoMessage."""
    rng = random.Random(seed)
    source = rng.choice(honest)
    message = copied(source, RecordDict(fresh_records(source.content)))
    if rng.random() < 0.03:
        return [copied(source, Error(rng.choice([0, 2, 5, 8]), rng.choice(TEXTS)))]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        spoil_record(message.content, rng)
    if rng.random() < 0.1:
        spoil_metadata(message, honest, rng)
    carry = rng.choice([over_protobuf, over_protobuf, over_objects])
    try:
        found = copied(message, carry(message.content, rng, harm=rng.random() < 0.3))
    except Exception as error:  # of Flower's
        raise NoMessage(str(error)[:80]) from None
    return [found, found] if rng.random() < 0.03 else [found]


def fresh_records(content: RecordDict) -> dict[str, Any]:
    """The same records in new containers; their values are never changed in place."""
    return {name: type(record)(dict(record)) for name, record in content.items()}


def copied(message: Message, content: RecordDict | Error) -> Message:
    """With that content and metadata of its own."""
    metadata = message.metadata
    fresh = object.__new__(type(metadata))
    fresh.__dict__.update(metadata.__dict__)
    error, content = (content, None) if isinstance(content, Error) else (None, content)
    return Message(metadata=fresh, content=content, error=error)  # type: ignore[call-overload]
