"""The worker's door: who is let in, what is not a frame, and who waits for whom. Real sockets, work of no weight."""

import json
import os
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spry_app.errors import SpryError
from spry_app.worker.ask import ask, health
from spry_app.worker.place import Place
from spry_app.worker.serve import MOST_WAITING, Server, Work, listen
from spry_app.worker.wire import MAGIC, MOST_BODY_BYTES, Bodies, Header, WireError, WrongKey, enter, receive, send


@pytest.fixture
def place() -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    yield Place(folder / "w.sock")
    shutil.rmtree(folder)


@contextmanager
def serving(place: Place, work: Work, idle_s: float = 0.0) -> Iterator[threading.Thread]:
    """A worker's loop in a thread of this process, which also holds the lock."""
    place.prepare()
    lock = place.lock()
    assert lock is not None
    listener = listen(place)
    server = Server(listener, place.key(), "here", idle_s)
    server.open()
    thread = threading.Thread(target=server.serve, args=(work,), daemon=True)
    thread.start()
    try:
        yield thread
        if not idle_s:
            call(place, {"code": "another"})  # ends the loop
        thread.join(10)
        assert not thread.is_alive()
    finally:
        listener.close()
        os.close(lock)


def echo(header: Header, bodies: Bodies) -> tuple[Header, Bodies]:
    return {"said": header["do"]}, bodies


def call(place: Place, header: Header, bodies: Bodies | None = None) -> tuple[Header, Bodies]:
    """One job by hand; the answer."""
    with connected(place) as worker:
        enter(worker, place.key())
        send(worker, {"do": "x", "code": "here", "root": "/", **header}, bodies or [])
        receive(worker)
        return receive(worker)


@contextmanager
def connected(place: Place) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as worker:
        worker.settimeout(10)
        worker.connect(str(place.socket))
        yield worker


def test_bodies_come_back_as_they_went(place: Place) -> None:
    bodies = [b"", os.urandom(3 << 20)]
    with serving(place, echo):
        assert ask(place, {"do": "hello", "code": "here"}, bodies, "/", 1.0) == ({"said": "hello"}, bodies)


def test_who_holds_another_key_is_refused_and_so_is_a_worker_that_does(place: Place) -> None:
    done = []

    def work(header: Header, bodies: Bodies) -> tuple[Header, Bodies]:
        done.append(header)
        return {}, []

    with serving(place, work):
        key = place.key()
        with connected(place) as worker, pytest.raises(WrongKey):
            enter(worker, bytes(32))
        place.key_file.write_bytes(bytes(32))
        with pytest.raises(SpryError, match="another key"):
            ask(place, {"do": "x", "code": "here"}, [], "/", 1.0)
        place.key_file.write_bytes(key)
        # Whoever skips the proof gets nothing done: what it sends is taken for one.
        with connected(place) as worker:
            send(worker, {"do": "x", "code": "here", "root": "/"})
            worker.shutdown(socket.SHUT_WR)
            assert b"pid" not in b"".join(iter(lambda: worker.recv(4096), b""))
    assert [each["do"] for each in done] == []


def _frame(header: bytes) -> bytes:
    return MAGIC + struct.pack(">I", len(header)) + header


HUGE = json.dumps({"do": "x", "code": "here", "root": "/", "bodies": [MOST_BODY_BYTES]}).encode()
BAD: dict[str, bytes] = {
    "garbage": b"GET / HTTP/1.1\r\n\r\n" * 10,
    "a header that is too long": MAGIC + struct.pack(">I", 1 << 31),
    "no JSON": _frame(b"\xff\xfe{"),
    "nested without end": _frame(b"[" * 60000),
    "no object": _frame(b"[]"),
    "no lengths": _frame(b"{}"),
    "a negative length": _frame(b'{"bodies": [-1]}'),
    "a length that is no number": _frame(b'{"bodies": [true, 1.5]}'),
    "too many bodies": _frame(b'{"bodies": [0, 0, 0, 0, 0]}'),
    "more than may be": _frame(json.dumps({"bodies": [MOST_BODY_BYTES, 1]}).encode()),
    "more than comes": _frame(HUGE) + b"x",
    "half a header": _frame(HUGE)[:20],
    "no job": _frame(b'{"do": 3, "code": null, "bodies": []}'),
    "nothing": b"",
}


def test_what_is_not_a_frame_costs_nothing_and_ends_nothing(place: Place) -> None:
    """Also the frame that says it has 2 GiB, of which one byte comes."""
    with serving(place, echo):
        before = _peak_kib()
        for bad in BAD.values():
            with connected(place) as worker:
                enter(worker, place.key())
                worker.sendall(bad)
                worker.shutdown(socket.SHUT_WR)
                assert _says_nothing(worker)
        assert call(place, {})[0] == {"said": "x"}
        assert _peak_kib() - before < 64 << 10


def _says_nothing(worker: socket.socket) -> bool:
    try:
        return worker.recv(1) == b""
    except ConnectionResetError:  # closed with bytes of ours unread
        return True


def _peak_kib() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=300), framed=st.booleans())
def test_any_bytes_are_a_frame_or_a_wire_error(data: bytes, framed: bool) -> None:
    received(_frame(data) if framed else data)


def received(data: bytes) -> None:
    """Read from a socket: a frame, or a WireError."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        try:
            header, bodies = receive(ours)
        except WireError:
            return
        assert isinstance(header, dict)
        assert all(isinstance(body, bytes) for body in bodies)


def test_two_at_once_wait_for_each_other_and_health_waits_for_nobody(place: Place) -> None:
    at_work, most, go = [], [], threading.Event()

    def work(header: Header, bodies: Bodies) -> tuple[Header, Bodies]:
        at_work.append(header)
        most.append(len(at_work))
        go.wait(10)
        at_work.pop()
        return {}, bodies

    answers = []
    with serving(place, work):
        callers = [
            threading.Thread(target=lambda n=n: answers.append(call(place, {}, [bytes([n])])[1])) for n in range(2)
        ]
        for caller in callers:
            caller.start()
        _until(lambda: (found := health(place)) is not None and found["working"] and found["waiting"] == 1)
        go.set()
        for caller in callers:
            caller.join(10)
    assert sorted(answers) == [[b"\0"], [b"\1"]]
    assert most == [1, 1]


def test_a_caller_that_died_while_it_waited_costs_no_work_and_too_many_are_told(place: Place) -> None:
    done, go = [], threading.Event()

    def work(header: Header, bodies: Bodies) -> tuple[Header, Bodies]:
        go.wait(10)
        done.append(header["do"])
        return {}, []

    with serving(place, work):
        waiting = []
        for number in range(1 + MOST_WAITING):
            worker = socket.socket(socket.AF_UNIX)
            worker.connect(str(place.socket))
            enter(worker, place.key())
            send(worker, {"do": str(number), "code": "here", "root": "/"})
            receive(worker)
            waiting.append(worker)
            _until(lambda: (found := health(place)) is not None and found["working"])
        with pytest.raises(SpryError, match=f"{MOST_WAITING} messages waiting"):
            ask(place, {"do": "x", "code": "here"}, [], "/", 1.0)
        for worker in waiting[1:]:
            worker.close()
        go.set()
        assert receive(waiting[0]) == ({}, [])
        waiting[0].close()
    assert done == ["0"]


def test_no_thread_is_made_for_a_caller(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short of memory, a process can hang in the making of one; whoever calls it then would wait for ever."""
    with serving(place, echo):
        monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail("a thread was made"))
        assert call(place, {})[0]["said"] == "x"
        assert (found := health(place)) and found["jobs"] == 1


def test_it_ends_when_nobody_came_for_a_while_and_only_then(place: Place) -> None:
    started = time.monotonic()
    with serving(place, echo, idle_s=0.6) as thread:
        time.sleep(0.4)
        call(place, {})
        assert health(place) is not None  # does not count as work
        time.sleep(0.4)
        assert thread.is_alive()
    assert time.monotonic() - started > 1.0


def test_a_stale_socket_is_replaced_and_a_living_worker_is_not(place: Place) -> None:
    place.prepare()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place.socket))
    assert place.process() is None
    with serving(place, echo):
        assert place.process() == os.getpid()
        assert place.lock() is None
        assert call(place, {})[0] == {"said": "x"}
    assert place.process() is None


@pytest.mark.parametrize("which", ["folder", "key"])
def test_what_others_may_read_is_refused(place: Place, which: str) -> None:
    place.prepare()
    place.key()
    (place.socket.parent if which == "folder" else place.key_file).chmod(0o755)
    with pytest.raises(SpryError, match=rf"{which} .* has mode 755"):
        place.prepare()
        place.key()


def test_a_path_that_no_socket_may_have_is_refused() -> None:
    with pytest.raises(SpryError, match="shorter"):
        Place(Path("/tmp") / ("x" * 100) / "w.sock").prepare()


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
