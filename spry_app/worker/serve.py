"""The worker's loop: callers are let in by threads, one job at a time is done by the main thread. What a job is, is
not known here.
"""

import logging
import os
import queue
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from spry_app.worker.place import Place
from spry_app.worker.wire import PATIENCE_S, Bodies, Header, WireError, admit, receive, send

Work = Callable[[Header, Bodies], tuple[Header, Bodies]]
MIB = 2**20
MOST_WAITING = 16
DOORMEN = 16
"""Threads, all of them made at the start: a process short of memory can hang while it makes one (CPython)."""
HANDSHAKE_S = 30.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a caller wants, and where it waits."""

    caller: socket.socket
    header: Header
    bodies: Bodies


def listen(place: Place) -> socket.socket:
    """A socket of mode 0600 where the last worker's may still lie; to be called by who holds the lock."""
    place.socket.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(place.socket))
    finally:
        os.umask(before)
    listener.listen()
    return listener


class Server:
    """Answers callers on `listener` who hold `key`. code: what this process runs; a job that needs other code ends
    `serve`. idle_s: seconds without a job after which it ends too; 0 for never.
    """

    def __init__(self, listener: socket.socket, key: bytes, code: str, idle_s: float) -> None:
        self._listener, self._key, self._code, self._idle_s = listener, key, code, idle_s
        self._jobs: queue.Queue[Job] = queue.Queue(MOST_WAITING)
        self._door = threading.Lock()
        self._closed = False
        self._working = False
        self._done = 0
        self._since = time.monotonic()
        self.facts: Callable[[], dict[str, Any]] = dict

    def open(self) -> None:
        """Begin to let callers in; their jobs wait for `serve`."""
        for _ in range(DOORMEN):
            threading.Thread(target=self._accept, daemon=True).start()

    def serve(self, work: Work) -> Header | None:
        """Do jobs until none has come for `idle_s`, or until one needs other code: then its header is returned."""
        while (job := self._next()) is not None:
            if job.header["code"] != self._code:
                self._send_away(job)
                return job.header
            with job.caller:
                self._do(job, work)
        return None

    def health(self) -> Header:
        """Of this process: MiB resident now and at the worst, jobs done, seconds without one."""
        scale = MIB if sys.platform == "darwin" else MIB // 1024
        return {
            "pid": os.getpid(),
            "code": self._code,
            "rss-mib": round(psutil.Process().memory_info().rss / MIB, 1),
            "peak-mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 1),
            "jobs": self._done,
            "waiting": self._jobs.qsize(),
            "working": self._working,
            "idle-s": 0.0 if self._working else round(time.monotonic() - self._since, 1),
            **self.facts(),
        }

    def _next(self) -> Job | None:
        while True:
            left = self._since + self._idle_s - time.monotonic() if self._idle_s else None
            try:
                return self._jobs.get(timeout=None if left is None else max(0.0, left))
            except queue.Empty:
                with self._door:
                    if self._jobs.empty():
                        self._closed = True
                        return None

    def _do(self, job: Job, work: Work) -> None:
        if _is_gone(job.caller):
            return
        self._working = True
        try:
            send(job.caller, *work(job.header, job.bodies))
        except (WireError, MemoryError) as error:
            logger.warning("An answer was lost: %r", error)
        finally:
            self._working, self._since, self._done = False, time.monotonic(), self._done + 1

    def _send_away(self, job: Job) -> None:
        """This caller and all that wait ask the process that comes next."""
        with self._door:
            self._closed = True
            waiting = [job]
            while not self._jobs.empty():
                waiting.append(self._jobs.get_nowait())
        for each in waiting:
            with each.caller:
                try:
                    send(each.caller, {"again": True})
                except WireError:
                    continue

    def _accept(self) -> None:
        while self._listener.fileno() >= 0:
            try:
                caller, _ = self._listener.accept()
            except (OSError, MemoryError):  # no descriptor left, or closed
                time.sleep(0.05)
                continue
            self._receive(caller)

    def _receive(self, caller: socket.socket) -> None:
        kept = False
        try:
            caller.settimeout(HANDSHAKE_S)
            admit(caller, self._key)
            caller.settimeout(PATIENCE_S)
            header, bodies = receive(caller)
            if header.get("do") == "health":
                send(caller, self.health())
            elif isinstance(header.get("code"), str) and isinstance(header.get("root"), str):
                kept = self._take(Job(caller, header, bodies))
        except (WireError, OSError, MemoryError) as error:
            logger.warning("A caller was sent away: %r", error)
        finally:
            if not kept:
                caller.close()

    def _take(self, job: Job) -> bool:
        with self._door:
            if self._closed:
                return False
            if self._jobs.full():
                send(job.caller, {"busy": self._jobs.qsize()})
                return False
            send(job.caller, {"pid": os.getpid()})
            self._jobs.put_nowait(job)
            return True


def _is_gone(caller: socket.socket) -> bool:
    """Nothing is computed for a caller that has died while it waited."""
    caller.setblocking(False)
    try:
        return caller.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        caller.settimeout(PATIENCE_S)


def inherited(descriptors: Sequence[int]) -> tuple[int, socket.socket]:
    """Lock and listener of the process that this one has replaced, so that no caller finds the door shut."""
    lock, listener = descriptors
    os.set_inheritable(lock, False)
    return lock, socket.socket(fileno=listener)
