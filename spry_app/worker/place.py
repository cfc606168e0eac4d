"""Where a node's worker is: its socket, and beside it its key, its lock, its log. Who may touch them is checked here;
nothing is said over the socket here.
"""

import fcntl
import os
import secrets
import signal
import stat
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flwr.supercore.utils import get_flwr_home

from spry_app.errors import SpryError
from spry_app.worker.wire import KEY_BYTES

_LONGEST_PATH = 103
"""Bytes of a Unix socket's path (macOS; Linux has 107)."""


@dataclass(frozen=True)
class Place:
    """A Unix socket in a folder that only this user may enter (mode 0700)."""

    socket: Path

    @property
    def key_file(self) -> Path:
        return self.socket.with_suffix(".key")

    @property
    def lock_file(self) -> Path:
        """Locked by the worker that lives, with its process id in it."""
        return self.socket.with_suffix(".lock")

    @property
    def log(self) -> Path:
        """What a worker writes that was started by a message."""
        return self.socket.with_suffix(".log")

    @property
    def at_work(self) -> Path:
        """Is there while a node's model is trained."""
        return self.socket.with_suffix(".training")

    def prepare(self) -> None:
        """Make the folder; raises SpryError where others may enter it or the path is too long for a socket."""
        folder = self.socket.parent
        if len(os.fsencode(self.socket)) > _LONGEST_PATH:
            raise SpryError(
                f"The worker's socket {self.socket} has a path of more than {_LONGEST_PATH} bytes, which no Unix "
                'socket may have: set worker="/a/shorter/path.sock" in the node config, or a shorter FLWR_HOME.'
            )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check(folder, "folder", f"chmod 700 {folder}, or name a socket in a folder of its own")

    def key(self) -> bytes:
        """The key, made by whoever comes first. Raises SpryError where others may read it."""
        if not self.key_file.exists():
            _write_once(self.key_file, secrets.token_bytes(KEY_BYTES))
        _check(self.key_file, "key", f"delete {self.key_file}; a new one is made")
        key = self.key_file.read_bytes()
        if len(key) != KEY_BYTES:
            raise SpryError(
                f"The worker's key {self.key_file} has {len(key)} bytes, not {KEY_BYTES}: stop the worker "
                "(spry worker --stop) and delete the key; a new one is made."
            )
        return key

    def lock(self) -> int | None:
        """A descriptor that holds the lock as long as it is open; None where another worker lives."""
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        while not _locked(descriptor, fcntl.LOCK_EX):
            if self.process() is not None:
                os.close(descriptor)
                return None
            time.sleep(0.01)  # somebody is looking who lives here
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return descriptor

    def process(self) -> int | None:
        """Process id of the worker that lives here; None where there is none."""
        try:
            descriptor = os.open(self.lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor) as file:
            return None if _locked(descriptor, fcntl.LOCK_SH) else int(file.read(32) or 0) or None

    def stop(self, patience_s: float = 5.0) -> bool:
        """End the worker that lives here, by its process id, and wait for it; False where there was none."""
        found = self.process()
        for request in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + patience_s
            with suppress(ProcessLookupError):
                if (now := self.process()) is not None:
                    os.kill(now, request)
            while self.process() is not None and time.monotonic() < deadline:
                time.sleep(0.02)
        return found is not None


def default_place(flwr_home: Path | None = None) -> Place:
    """One for each FLWR_HOME: SuperNodes that share it share a worker."""
    return Place((flwr_home or get_flwr_home()).expanduser().absolute() / "spry" / "worker.sock")


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check(path: Path, what: str, remedy: str) -> None:
    """That it is ours and closed to everybody else."""
    found = path.stat()
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise SpryError(
            f"The worker's {what} {path} belongs to user {found.st_uid} and has mode "
            f"{stat.S_IMODE(found.st_mode):o}; it must be closed to all but user {os.geteuid()}: {remedy}."
        )


def _write_once(path: Path, data: bytes) -> None:
    """Whole or not at all, and never over what another process has written meanwhile."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        os.unlink(temporary)
