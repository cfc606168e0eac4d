"""A secret key and the random numbers that follow from it: the same for the same coordinates, to everybody else as good
as truly random. Never from the seed of a run, which every client knows.
"""

import hashlib
import hmac
import json
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from spry_app.errors import SpryError

KEY_BYTES = 32


@dataclass(frozen=True)
class Secret:
    """A key of 256 bits. Numbers are ChaCha20's (RFC 8439), under a key of their own for each of the coordinates."""

    key: bytes = field(repr=False)

    @classmethod
    def at(cls, path: Path) -> Self:
        """The key in that file, mode 0600, made where there is none. Raises SpryError where others may read it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _write_once(path, secrets.token_bytes(KEY_BYTES))
        about, key = path.stat(), path.read_bytes()
        if stat.S_IMODE(about.st_mode) & 0o077 or about.st_uid != os.geteuid():
            raise SpryError(f"Others than this user may read {path}, the key of the privacy noise: chmod 600 {path}.")
        if len(key) != KEY_BYTES:
            raise SpryError(f"{path}, the key of the privacy noise, has {len(key)} bytes, not {KEY_BYTES}: delete it.")
        return cls(key)

    def words(self, count: int, *coordinates: str | int) -> NDArray[np.uint64]:
        """Uniform words of 64 bits; equal for equal coordinates."""
        key = hmac.digest(self.key, json.dumps(coordinates).encode(), hashlib.sha256)
        stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(8 * count))
        return np.frombuffer(stream, "<u8")

    def normals(self, count: int, *coordinates: str | int) -> NDArray[np.float64]:
        """Of N(0, 1), by Box and Muller from 53 bits each."""
        radius, angle = (self.words(2 * count, *coordinates) >> np.uint64(11)).reshape(2, count) * 2.0**-53
        return np.asarray(np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle))

    def order(self, count: int, *coordinates: str | int) -> list[int]:
        """The numbers below `count` in an order of which all are as likely (but for words that are equal)."""
        return [int(index) for index in np.argsort(self.words(count, *coordinates), kind="stable")]


def _write_once(path: Path, content: bytes) -> None:
    """Whole or not at all, and only where there is none: nodes that share a folder may come at the same time."""
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        with suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        fresh.unlink()
