"""The resident worker as a process: what it keeps, when it reloads, what happens when it dies or has no memory."""

import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from federation import Federation, make_checkpoint, same, tiny_run
from flwr.app import Message

from benchmarks.local_grid import LocalGrid
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.protocol import Task, introduction_request, refusal_reason
from spry_app.worker import dispatch
from spry_app.worker.ask import ask, health, started
from spry_app.worker.dispatch import ROOT, code_here, worker_of
from spry_app.worker.place import Place, default_place

CLIENT_PROCESS = "flwr.supernode.runtime.run_clientapp"
NODE = 100
"""Id of LocalGrid's first node."""


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """FLWR_HOME of the node whose worker these tests share: a test that finds none starts one."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    yield folder
    default_place(folder).stop()
    for worker in started:
        worker.wait(10)
    shutil.rmtree(folder)


@pytest.fixture
def node(home: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """This process passes for one that a SuperNode has started."""
    monkeypatch.setenv("FLWR_HOME", str(home))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(dispatch, "called_by_supernode", lambda: True)
    return default_place()


def introduce(grid: LocalGrid, fingerprint: str) -> Message:
    (reply,) = grid.send_and_receive([introduction_request(NODE, fingerprint)])
    return reply


def introduced(reply: Message) -> dict[str, Any]:
    assert "introduction" in reply.content, refusal_reason(reply)
    return dict(reply.content["introduction"])


def of(place: Place) -> dict[str, Any]:
    """Health of a worker that must be there."""
    found = health(place)
    assert found is not None
    return found


def test_a_federation_through_the_worker_gives_the_same_bits(
    tmp_path: Path, node: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With scalars both ways, what a node has learned is in Flower's state, which goes to the worker and back."""
    run = tiny_run(tmp_path) | {"method": "spry-per-iteration", "client.worker": "off"}
    alone = Federation(tmp_path / "alone", run)
    alone.start(clients=2)
    assert health(node) is None
    through = Federation(tmp_path / "through", run | {"client.worker": "auto"})
    grid = through.start(clients=2)
    assert same(alone.strategy.snapshot(), through.strategy.snapshot())
    assert all("held" in context.state for context in grid.contexts.values())
    assert of(node)["loads"] == 1
    assert of(node)["jobs"] >= 6
    before = of(node)["jobs"]
    Path(run["data.source"]).unlink()  # nothing is read again
    again = introduced(introduce(LocalGrid(2, through.run_config), through.adapted.fingerprint))
    assert again["examples"] == 36
    assert (of(node)["jobs"], of(node)["loads"]) == (before + 1, 1)


def test_a_client_process_answers_without_torch(tmp_path: Path, node: Place) -> None:
    made = Federation(tmp_path / "run", tiny_run(tmp_path))
    code = f"""
import sys
import {CLIENT_PROCESS} as caller
exec("def call(app, *arguments): return app(*arguments)", vars(caller))  # as if it stood there
from flwr.app import Context, RecordDict
from benchmarks.local_grid import identify
identify()
from client_app import app
from flwr.app import ConfigRecord, Message
asked = ConfigRecord({{"fingerprint": {made.adapted.fingerprint!r}}})
request = Message(RecordDict({{"config": asked}}), 1, "query.introduce")
own = {{"partition-id": 0, "num-partitions": 2}}
context = Context(run_id=1, node_id=1, node_config=own, state=RecordDict(), run_config={made.run_config!r})
reply = caller.call(app, request, context)
print(dict(reply.content["introduction"])["examples"], "torch" in sys.modules, "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["36", "False", "False"], done.stdout + done.stderr


def test_another_model_is_loaded_and_another_step_size_is_not(tmp_path: Path, node: Place) -> None:
    run = tiny_run(tmp_path)
    first = Federation(tmp_path / "first", run)
    introduced(introduce(LocalGrid(2, run), first.adapted.fingerprint))
    loads = of(node)["loads"]
    introduced(introduce(LocalGrid(2, run | {"client.learning-rate": 0.01}), first.adapted.fingerprint))
    assert of(node)["loads"] == loads
    other = run | {"model.name": str(make_checkpoint(tmp_path / "other", seed=1))}
    said = refusal_reason(introduce(LocalGrid(2, other), first.adapted.fingerprint))
    assert "not the server's" in said
    assert (of(node)["loads"], of(node)["model"]) == (loads + 1, other["model.name"])
    make_checkpoint(tmp_path / "other")  # the refusal's own remedy: the server's weights
    assert introduced(introduce(LocalGrid(2, other), first.adapted.fingerprint))["examples"] == 36


def test_a_run_with_other_code_is_answered_by_that_code_in_the_same_process(tmp_path: Path, node: Place) -> None:
    """The code is this one under another name; the worker that gives way keeps its socket, so no second one starts."""
    job = {"do": "introduce", "code": code_here()}
    ask(node, job, [], str(ROOT), 60.0)
    first = of(node)
    header, _ = ask(node, job | {"code": "other"}, [], str(ROOT), 60.0)
    assert "ValueError" in header["error"]  # two bodies are missing
    assert (of(node)["pid"], of(node)["code"], of(node)["jobs"]) == (first["pid"], "other", 1)


def _train(grid: LocalGrid, made: Federation, **changed: Any) -> Message:
    """One training message; `changed` keys of the run config, for this node only."""
    units = made.adapted.units
    task = Task(1, 0, made.adapted.tensors(), tuple(units), made.adapted.fingerprint, directions=512)
    grid.contexts[NODE].run_config.update(changed)
    (reply,) = grid.send_and_receive([task.to_message(NODE)])
    return reply


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_fails_that_message_alone(tmp_path: Path, node: Place) -> None:
    run = tiny_run(tmp_path) | {"client.directions": 512, "client.directions-at-once": 256}
    made, grid = Federation(tmp_path / "run", run), LocalGrid(2, run)
    introduced(introduce(grid, made.adapted.fingerprint))
    pid = of(node)["pid"]

    def kill() -> None:
        while not (node.at_work.exists() and of(node)["working"]):  # it answers while it works
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(SpryError, match=rf"process {pid}\) ended in the middle.*memory-budget-mib.*worker\.log"):
        _train(grid, made, **{"client.local-steps": 100000})
    killer.join()
    assert health(node) is None
    state = grid.contexts[NODE].state
    before = dict(state["slices.forward-mode"])
    assert "metrics" in _train(grid, made, **{"client.local-steps": 2}).content
    assert of(node)["pid"] != pid
    after = dict(grid.contexts[NODE].state["slices.forward-mode"])  # the system may have ended it for its memory
    assert (before["micro_batch"], after["micro_batch"]) == (4, 2)
    assert not node.at_work.exists()


def test_a_worker_without_memory_refuses_and_takes_less_until_it_has_enough(tmp_path: Path, node: Place) -> None:
    """512 directions at once over 64 rows take hundreds of MiB, and it may have 40 more."""
    large = {"client.directions-at-once": 512, "client.micro-batch": 64, "client.batch-size": 64}
    run = tiny_run(tmp_path) | {"client.directions": 512} | large
    made, grid = Federation(tmp_path / "run", run), LocalGrid(1, run)
    introduced(introduce(grid, made.adapted.fingerprint))
    worker = psutil.Process(of(node)["pid"])
    free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    worker.rlimit(psutil.RLIMIT_AS, (worker.memory_info().vms + 40 * 2**20, resource.RLIM_INFINITY))
    said = []
    while reason := refusal_reason(reply := _train(grid, made)):
        said.append(reason)
    worker.rlimit(psutil.RLIMIT_AS, free)
    assert "out of memory" in said[0]
    assert "client.memory-budget-mib" in said[0]
    assert "takes 32 examples and 512 directions at once" in said[0]
    assert 1 <= len(said) < 10
    assert "metrics" in reply.content
    assert of(node)["pid"] == worker.pid


def test_the_command_serves_reports_refuses_a_second_and_stops(home: Path) -> None:
    socket = home / "command" / "w.sock"
    spry = [sys.executable, "-m", "spry_app.cli", "worker", "--socket", str(socket)]
    place = Place(socket)
    with subprocess.Popen(spry, cwd=ROOT, stderr=subprocess.DEVNULL) as first:
        try:
            while place.process() is None or not socket.exists():
                assert first.poll() is None
                time.sleep(0.02)
            assert (socket.stat().st_mode & 0o777, socket.parent.stat().st_mode & 0o777) == (0o600, 0o700)
            status = subprocess.run([*spry, "--status"], cwd=ROOT, capture_output=True, check=True)
            assert json.loads(status.stdout)["pid"] == first.pid
            assert place.key_file.stat().st_mode & 0o777 == 0o600
            assert subprocess.run(spry, cwd=ROOT, capture_output=True).returncode == 75
            assert subprocess.run([*spry, "--stop"], cwd=ROOT).returncode == 0
            assert first.wait(10) == 0
        finally:
            first.kill()
    assert not socket.exists()
    assert subprocess.run([*spry, "--stop"], cwd=ROOT, capture_output=True).returncode == 1


def test_a_worker_that_cannot_start_is_a_sentence_with_its_log(home: Path) -> None:
    place = Place(home / "broken" / "w.sock")
    place.prepare()
    place.key_file.write_bytes(b"short")
    place.key_file.chmod(0o600)
    with pytest.raises(SpryError, match=r"exit status 2\). Its log: .*w\.log.*client\.worker"):
        ask(place, {"do": "introduce", "code": "x"}, [], str(ROOT), 60.0)
    assert "has 5 bytes, not 32" in place.log.read_text()


def test_who_answers(home: Path, node: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(own: dict[str, Any], **run: Any) -> Place | None:
        context = LocalGrid(1, RunConfig.defaults() | run, own=[own]).contexts[NODE]
        return worker_of(context)

    assert asked({}) == Place(home / "spry" / "worker.sock")
    assert asked({"worker": "/run/spry/w.sock"}) == Place(Path("/run/spry/w.sock"))
    assert asked({"worker": "off"}) is None
    assert asked({}, **{"client.worker": "off"}) is None
    monkeypatch.undo()
    importlib.import_module(CLIENT_PROCESS)  # that it was imported is not that it calls
    assert asked({}) is None  # a simulation, or a process of ours
    assert asked({"worker": "/run/spry/w.sock"}) is None
