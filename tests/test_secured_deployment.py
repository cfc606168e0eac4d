"""A SuperLink with TLS and node authentication behind its gate, as the files in deploy/ start them: who gets in."""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployed import NGINX, ROOT, Deployment, command, deployment, spry
from federation import make_checkpoint, make_rows

from spry_app.launcher.logs import read
from spry_app.launcher.superlink import free_port
from spry_app.worker.ask import health
from spry_app.worker.place import default_place


@pytest.fixture(scope="module")
def server() -> Iterator[Deployment]:
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as folder, deployment(Path(folder)) as deployed:
        yield deployed


@pytest.mark.skipif(not NGINX, reason="needs nginx")
@pytest.mark.parametrize(
    "path", ["/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task", "/docs"]
)
def test_the_gate_lets_nobody_start_a_run_or_let_nodes_in(server: Deployment, path: str) -> None:
    """The SuperLink itself answers them all, without asking who it is."""
    assert server.status(server.door, "POST", path) == 403
    assert server.status(server.door, "POST", path.replace("/v1/", "/v1/fleet/../")) == 403
    assert server.status(server.port, "POST", path) not in (0, 401, 403)


@pytest.mark.skipif(not NGINX, reason="needs nginx")
def test_the_gate_lets_nodes_through_to_be_asked_for_their_key(server: Deployment) -> None:
    assert server.status(server.door, "GET", "/health") == 200
    assert server.status(server.door, "POST", "/v1/fleet/pull-messages") == server.status(
        server.port, "POST", "/v1/fleet/pull-messages"
    )


@pytest.mark.slow
def test_two_nodes_with_keys_train_while_strangers_are_refused(server: Deployment, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "tiny")
    test = make_rows(tmp_path / "test.jsonl", 40, offset=5000)
    folder = ("--folder", str(server.etc))
    for index, name in enumerate(("jetson", "laptop")):
        rows = make_rows(tmp_path / f"{name}.jsonl", 64, offset=1000 * index)
        line = spry("node", name, "--port", str(server.door), *folder)
        assert f"--superlink 127.0.0.1:{server.door} " in line
        spry("register", name, *folder)
        server.node(name, f'data = "{rows}"\n', server.etc / "nodes" / f"{name}.key")
    unit = server.worker("jetson")
    spry("node", "stranger", *folder)
    strangers = {
        "with-a-key-of-its-own": server.node("with-a-key-of-its-own", "", server.etc / "nodes" / "stranger.key"),
        "without-a-key": keyless(server),
    }
    settings = {
        "method": "spry-per-iteration",
        "num-server-rounds": 1,
        "model.name": str(tmp_path / "tiny"),
        "data.source": str(tmp_path / "jetson.jsonl"),
        "data.num-labels": 2,
        "data.natural-field": "user",
        "data.test": str(test),
        "client.local-steps": 2,
        "client.batch-size": 4,
        "server.optimizer": "average",
        "output-dir": str(tmp_path / "outputs"),
    }
    run_id = server.superlink.submit(ROOT, settings, {})
    outcome = server.superlink.follow(run_id, server.log("run"), lambda: None)
    assert outcome.completed, outcome.details + read(server.log("run")) + read(server.log("superlink"))
    rows = (tmp_path / "outputs" / run_id / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(rows[-1])[key] for key in ("asked", "answered", "refused")] == [2, 2, 0]
    warm = health(default_place(server.folder / "jetson"))
    assert warm and (warm["pid"], warm["loads"]) == (unit.pid, 1)  # no message has started another one
    for name, stranger in strangers.items():
        assert stranger.wait(timeout=120) != 0, read(server.log(name))
    listed = [line.split()[::2] for line in spry("list", *folder).splitlines()]
    assert sorted(listed) == [["jetson", "online"], ["laptop", "online"]]


def keyless(server: Deployment) -> subprocess.Popen[bytes]:
    """A node that knows the address and the certificate, and has no key."""
    words = server.moved(command("spry-supernode.service"), SUPERLINK=f"127.0.0.1:{server.door}")
    for option in ("--auth-supernode-private-key", "--node-config", "--port"):
        at = words.index(option)
        words = [*words[:at], *words[at + 2 :]]
    return server.processes.start([*words, "--port", str(free_port())], server.log("without-a-key"))


def test_a_node_that_was_removed_never_comes_back(server: Deployment) -> None:
    folder = ("--folder", str(server.etc))
    spry("node", "old", *folder)
    key = server.etc / "old.key"
    key.write_bytes((server.etc / "nodes" / "old.key").read_bytes())
    spry("register", "old", *folder)
    assert "registered" in next(line for line in spry("list", *folder).splitlines() if line.startswith("old "))
    node_id = spry("remove", "old", *folder).split()[2].rstrip(";")
    assert not list((server.etc / "nodes").glob("old.*"))
    assert server.node("old", "", key).wait(timeout=120) != 0
    assert node_id not in spry("list", *folder)
