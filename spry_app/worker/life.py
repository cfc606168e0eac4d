"""A worker's life from the command line: take the place, serve, give way to other code, or end. Jobs are in jobs.py."""

import logging
import os
import signal
import socket
import sys
from pathlib import Path

from spry_app.errors import SpryError
from spry_app.worker.ask import ANOTHER_LIVES, python_path
from spry_app.worker.dispatch import code_here
from spry_app.worker.place import Place
from spry_app.worker.serve import Server, inherited, listen
from spry_app.worker.wire import Header

logger = logging.getLogger(__name__)


def live(place: Place, idle_s: float, code: str = "", descriptors: str = "") -> int:
    """Exit status: 0 after `idle_s` without a job or on SIGTERM, 75 where another worker lives in this place.

    code: what callers know this code as. descriptors: of lock and listener, from the process that gave way to this one.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    place.prepare()
    key = place.key()
    if descriptors:
        lock, listener = inherited([int(each) for each in descriptors.split(",")])
    elif (taken := place.lock()) is None:
        logger.info("Another worker lives at %s: process %s", place.socket, place.process())
        return ANOTHER_LIVES
    else:
        lock, listener = taken, listen(place)
    server = Server(listener, key, code or code_here(), idle_s)
    try:
        logger.info("Listening on %s", place.socket)
        server.open()
        other = _serve(server, place)
    except BaseException:
        place.socket.unlink(missing_ok=True)
        raise
    if other is not None:
        _give_way(place, idle_s, other, lock, listener)
    place.socket.unlink(missing_ok=True)
    logger.info("No message for %g s: ended", idle_s)
    return 0


def _serve(server: Server, place: Place) -> Header | None:
    from spry_app.worker.jobs import Jobs  # torch: after the door is open, so that callers can wait

    jobs = Jobs(place.at_work)
    server.facts = jobs.facts
    return server.serve(jobs)


def _give_way(place: Place, idle_s: float, job: Header, lock: int, listener: socket.socket) -> None:
    """Become a process that runs what `job` needs; lock and socket stay, so callers find somebody all the time."""
    root = Path(job["root"])
    if not (root / "spry_app").is_dir():
        raise SpryError(f"A message asks for a worker with the code in {root}, where there is none of Spry.")
    logger.info("A run needs other code: starting again from %s", root)
    for descriptor in (lock, listener.fileno()):
        os.set_inheritable(descriptor, True)
    command = [sys.executable, "-P", "-m", "spry_app.cli", "worker", "--socket", str(place.socket)]
    command += ["--idle-s", str(idle_s), "--code", job["code"], "--descriptors", f"{lock},{listener.fileno()}"]
    logging.shutdown()
    os.execve(sys.executable, command, os.environ | {"PYTHONPATH": python_path(str(root))})
