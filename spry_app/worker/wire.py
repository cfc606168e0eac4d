"""Frames over a socket between two ends that hold the same key: a JSON header and bodies of bytes, with every length
checked before anything is read. What they say is not known here.
"""

import hmac
import json
import secrets
import socket
import struct
from collections.abc import Sequence
from typing import Any

Header = dict[str, Any]
Bodies = list[bytes]

MAGIC = b"SPRY1\n"
KEY_BYTES = 32
MOST_HEADER = 1 << 16
MOST_BODIES = 4
MOST_BODY_BYTES = (1 << 31) - 1
"""Of all bodies of a frame: what Flower's own protobuf may hold."""
PATIENCE_S = 60.0
"""How long the other end may say nothing within a frame."""
_HEAD = struct.Struct(f">{len(MAGIC)}sI")
_CHUNK = 1 << 20
_NO_PROOF = bytes(KEY_BYTES)


class WireError(Exception):
    """The other end broke the rules, went silent or went away; the sentence says which."""


class WrongKey(WireError):
    """The other end holds another key."""


def send(to: socket.socket, header: Header, bodies: Sequence[bytes] = ()) -> None:
    """One frame. Raises WireError."""
    text = json.dumps({**header, "bodies": [len(body) for body in bodies]}).encode()
    if len(text) > MOST_HEADER or sum(map(len, bodies)) > MOST_BODY_BYTES:
        raise WireError(f"a frame of {len(text)} and {sum(map(len, bodies))} bytes is more than may be sent")
    try:
        to.sendall(_HEAD.pack(MAGIC, len(text)) + text)
        for body in bodies:
            to.sendall(body)
    except OSError as error:
        raise WireError(f"the other end went away ({error})") from None


def receive(source: socket.socket) -> tuple[Header, Bodies]:
    """One frame. Raises WireError; takes no more memory than what really came."""
    magic, size = _HEAD.unpack(_read(source, _HEAD.size))
    if magic != MAGIC or size > MOST_HEADER:
        raise WireError(f"this is not a frame: {magic!r}, a header of {size} bytes")
    header = _object(_read(source, size))
    lengths = header.pop("bodies", None)
    if (
        not isinstance(lengths, list)
        or len(lengths) > MOST_BODIES
        or not all(type(n) is int and n >= 0 for n in lengths)
    ):
        raise WireError("the header does not say how long the bodies are")
    if sum(lengths) > MOST_BODY_BYTES:
        raise WireError(f"bodies of {sum(lengths)} bytes; {MOST_BODY_BYTES} are allowed")
    return header, [_read(source, length) for length in lengths]


def admit(caller: socket.socket, key: bytes) -> None:
    """Let in who proves to hold `key` (HMAC-SHA256 of a nonce of ours), and prove it in turn. Raises WrongKey."""
    ours = secrets.token_bytes(KEY_BYTES)
    _write(caller, MAGIC + ours)
    theirs, proof = _read(caller, KEY_BYTES), _read(caller, KEY_BYTES)
    if not hmac.compare_digest(proof, _proof(key, b"caller", ours, theirs)):
        _write(caller, _NO_PROOF)
        raise WrongKey("the caller does not hold the key")
    _write(caller, _proof(key, b"worker", ours, theirs))


def enter(worker: socket.socket, key: bytes) -> None:
    """The other half of `admit`. Raises WrongKey where either end does not hold `key`."""
    greeting, ours = _read(worker, len(MAGIC) + KEY_BYTES), secrets.token_bytes(KEY_BYTES)
    if not greeting.startswith(MAGIC):
        raise WireError("what listens there is not a worker of this version of Spry")
    theirs = greeting[len(MAGIC) :]
    _write(worker, ours + _proof(key, b"caller", theirs, ours))
    if not hmac.compare_digest(_read(worker, KEY_BYTES), _proof(key, b"worker", theirs, ours)):
        raise WrongKey("it holds another key")


def _proof(key: bytes, role: bytes, workers: bytes, callers: bytes) -> bytes:
    return hmac.digest(key, role + workers + callers, "sha256")


def _object(text: bytes) -> Header:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise WireError("the header is not a JSON object")
    return header


def _write(to: socket.socket, data: bytes) -> None:
    try:
        to.sendall(data)
    except OSError as error:
        raise WireError(f"the other end went away ({error})") from None


def _read(source: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes, kept as they come: a length that was made up costs nothing."""
    data = bytearray()
    while len(data) < size:
        try:
            part = source.recv(min(_CHUNK, size - len(data)))
        except OSError as error:
            raise WireError(f"the other end went away or fell silent ({error})") from None
        if not part:
            raise WireError(f"it was closed after {len(data)} of {size} bytes")
        data += part
    return bytes(data)
