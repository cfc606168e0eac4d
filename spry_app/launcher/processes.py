"""Child processes, stopped together with everything they started. Nothing of Flower here."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class Processes:
    """Children in sessions of their own (Ctrl-C reaches only us), and their descendants, orphaned ones included.

    A descendant that detaches itself (Flower's SuperExec, Ray) makes a new session, so the sessions seen below our
    children say which processes are ours even after the ones between have died.
    """

    def __init__(self, environment: Mapping[str, str], directory: Path) -> None:
        """`directory`: where the children run; Python would import an app's modules from it first, so keep it empty."""
        self.environment = environment
        self.directory = directory
        self._children: list[subprocess.Popen[bytes]] = []
        self._sessions: set[int] = set()

    def start(self, command: Sequence[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Start a child whose output is appended to `log`; `variables` are added to its environment."""
        with log.open("ab") as output:
            child = subprocess.Popen(
                command,
                env={**self.environment, **variables},
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children.append(child)
        self._sessions.add(child.pid)
        return child

    def call(self, command: Sequence[str], timeout_s: float = 120.0) -> str:
        """Run a child to its end and return what it wrote to stdout; its exit status says nothing (Flower's is 0)."""
        with tempfile.TemporaryFile() as errors:
            done = subprocess.run(
                command,
                env=self.environment,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                timeout=timeout_s,
            )
            errors.seek(0)
            return done.stdout.decode(errors="replace") or errors.read().decode(errors="replace")

    def note_descendants(self) -> None:
        """Remember the sessions below our children; to be called while the chain to them is whole."""
        for child in self._children:
            try:
                below = psutil.Process(child.pid).children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            self._sessions |= {session for process in below if (session := _session(process.pid)) is not None}

    def alive(self) -> list[psutil.Process]:
        """Every process of ours that still runs."""
        for child in self._children:
            child.poll()
        return [p for p in psutil.process_iter() if _session(p.pid) in self._sessions and not _is_zombie(p)]

    def stop(self, patience_s: float = 5.0) -> None:
        """Ask all of them to end, then make them."""
        self.note_descendants()
        for request in (signal.SIGTERM, signal.SIGKILL):
            for process in self.alive():
                try:
                    process.send_signal(request)
                except psutil.NoSuchProcess:
                    continue
            deadline = time.monotonic() + patience_s
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.05)
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(patience_s)  # a zombie whose other threads are still ending cannot be reaped yet

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            self.stop()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


def usable_cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
