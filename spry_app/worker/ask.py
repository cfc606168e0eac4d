"""The side that asks: connect to the worker or start one, hand over a job, ask how it is. Never imports torch."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from spry_app.errors import OutOfMemory, SpryError
from spry_app.worker.place import Place
from spry_app.worker.wire import PATIENCE_S, Bodies, Header, WireError, WrongKey, enter, receive, send

ANOTHER_LIVES = 75
"""Exit status of a worker that found another one in its place (EX_TEMPFAIL)."""
START_S = 180.0
"""How long a worker may take until it listens; it does so before it imports anything large."""
_PAUSE_S = 0.02
_ENDING_S = 2.0
"""How long the system may take to end a process whose sockets it has closed."""
_LONGEST_LOG = 4 << 20
started: list[subprocess.Popen[bytes]] = []
"""Workers that this process has started: they outlive it, and Python would warn of one that is forgotten."""


def health(place: Place) -> Header | None:
    """What the worker says of itself, also while it works; None where there is none. Raises SpryError."""
    if place.process() is None:
        return None
    try:
        with _connected(place) as worker:
            send(worker, {"do": "health"})
            return receive(worker)[0]
    except WrongKey as error:
        raise _wrong_key(place) from error
    except (OSError, WireError) as error:
        if _has_ended(place):
            return None
        raise SpryError(f"The worker of {place.socket} does not answer: {error}.") from error


def _has_ended(place: Place) -> bool:
    deadline = time.monotonic() + _ENDING_S
    while (lives := place.process() is not None) and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
    return not lives


def ask(place: Place, job: Header, bodies: Sequence[bytes], root: str, idle_s: float) -> tuple[Header, Bodies]:
    """The worker's answer to `job`. It is started where there is none, with the code in `root`.

    Raises SpryError where it cannot be started, is too busy, or ends before it has answered.
    """
    place.prepare()
    start = _Start(place, ["--code", str(job["code"]), "--idle-s", str(idle_s)], root)
    deadline, last = time.monotonic() + START_S, ""
    while time.monotonic() < deadline:
        try:
            with _connected(place) as worker:
                send(worker, {**job, "root": root}, bodies)
                taken = receive(worker)[0]
                if type(pid := taken.get("pid")) is int:
                    answer = _answer(place, worker, pid)
                    if "again" not in answer[0]:
                        return answer
                elif "busy" in taken:
                    raise SpryError(f"The worker of this node has {taken['busy']} messages waiting; ask it later.")
        except WrongKey as error:
            raise _wrong_key(place) from error
        except (FileNotFoundError, ConnectionRefusedError):
            start.once()
        except (OSError, WireError) as error:  # it was about to end, or has no room for a caller now
            last = f" ({error})"
        time.sleep(_PAUSE_S)
    raise SpryError(
        f"The worker of this node did not take the message within {START_S:g} s{last}. Its log: {place.log}"
    )


def _answer(place: Place, worker: socket.socket, pid: int) -> tuple[Header, Bodies]:
    worker.settimeout(None)  # a job takes what it takes
    try:
        return receive(worker)
    except WireError as error:
        raise OutOfMemory(
            f"The worker of this node (process {pid}) ended in the middle of this message; the next one starts "
            "another, with smaller steps where this one trained. Where the system was out of memory, lower "
            f"client.memory-budget-mib, or the node config's memory-budget-mib. Its log: {place.log}"
        ) from error


@contextmanager
def _connected(place: Place) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as worker:
        worker.settimeout(PATIENCE_S)
        worker.connect(str(place.socket))
        enter(worker, place.key())
        yield worker


class _Start:
    """Starts a worker that outlives this process, again only where one that ended had found another in its place."""

    def __init__(self, place: Place, options: Sequence[str], root: str) -> None:
        self._place = place
        # -P: the directory of the SuperNode is no place to import from.
        self._command = [sys.executable, "-P", "-m", "spry_app.cli", "worker", "--socket", str(place.socket), *options]
        self._environment = os.environ | {"PYTHONPATH": python_path(root)}
        self._child: subprocess.Popen[bytes] | None = None

    def once(self) -> None:
        status = None if self._child is None else self._child.poll()
        if status not in (None, 0, ANOTHER_LIVES):
            raise SpryError(
                f"The worker of this node could not be started (exit status {status}). Its log: {self._place.log}. "
                'client.worker="off" does without it, and loads the model for every message.'
            )
        if self._child is None or status is not None:
            with _open_log(self._place) as log:
                self._child = subprocess.Popen(
                    self._command,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            started.append(self._child)


def python_path(root: str) -> str:
    """That of this process, with the Spry in `root` and no other."""
    others = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join([root, *(path for path in others if not Path(path, "spry_app").is_dir())])


def _open_log(place: Place) -> IO[bytes]:
    """To be added to; begun anew where it has become long."""
    long = place.log.exists() and place.log.stat().st_size > _LONGEST_LOG
    return open(place.log, "wb" if long else "ab", opener=lambda path, flags: os.open(path, flags, 0o600))


def _wrong_key(place: Place) -> SpryError:
    return SpryError(
        f"The worker of {place.socket} holds another key than {place.key_file}: stop it (its process id is in "
        f"{place.lock_file}); the next message starts one that reads this key."
    )
