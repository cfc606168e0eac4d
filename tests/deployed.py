"""A deployment on loopback: the commands of deploy/'s own files, with their folders and ports moved to this test's."""

import configparser
import contextlib
import shlex
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from spry_app.cli import app
from spry_app.launcher.processes import Processes
from spry_app.launcher.superlink import HOST, SuperLink, environment, free_port
from spry_app.worker.place import default_place

ROOT = Path(__file__).parent.parent
UNITS = ROOT / "deploy" / "systemd"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def unit(name: str) -> dict[str, Any]:
    """A unit's [Service], with a list for each key that is given more than once."""
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNITS / name)
    return dict(parser["Service"])


def command(name: str) -> list[str]:
    """ExecStart of a unit."""
    return shlex.split(unit(name)["ExecStart"])


def compose(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "deploy" / name).read_text()))


def spry(*arguments: str) -> str:
    """stdout of a `spry deploy` command that must succeed."""
    result = CliRunner().invoke(app, ["deploy", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


class Deployment:
    """A server with TLS and node authentication, as deploy/ starts it, and nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.etc, self.home, self.logs = (folder / name for name in ("etc", "lib", "logs"))
        for made in (self.home, self.logs, folder / "empty"):
            made.mkdir()
        self.port, self.door = free_port(), free_port()
        spry("server", HOST, "--superlink", f"{HOST}:{self.port}", "--folder", str(self.etc))
        # Polled as often as by default, unlike in a simulation: with TLS, and on two cores, ten times a second is much.
        settings = environment(self.etc) | {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1.0"}
        self.processes = Processes(settings, folder / "empty")
        self.superlink = SuperLink(self.processes, self.logs)

    def moved(self, words: list[str], **values: str) -> list[str]:
        """A unit's command on this test's folders and ports."""
        moves = {"/opt/spry/bin/": "", "/etc/spry": str(self.etc), "/var/lib/spry": str(self.home)}
        moves |= {"/usr/sbin/nginx": str(NGINX), **{f"${{{key}}}": value for key, value in values.items()}}
        for old, new in moves.items():
            words = [word.replace(old, new) for word in words]
        return [str(self.port) if word == "8000" else word for word in words]

    def start(self) -> None:
        """SuperLink, and the gate where nginx is installed; without it `door` is the SuperLink's own."""
        self.processes.start(
            self.moved(command("spry-superlink.service")), self.logs / "superlink.log", FLWR_HOME=str(self.home)
        )
        self.wait(lambda: self.health(self.port))
        if not NGINX:
            self.door = self.port
            return
        text = (ROOT / "deploy" / "gate.conf").read_text().replace("/tmp/spry-gate", str(self.folder / "gate"))
        text = text.replace("8443", str(self.door)).replace(f"{HOST}:8000", f"{HOST}:{self.port}")
        (self.etc / "gate.conf").write_text(text)
        self.processes.start(self.moved(command("spry-gate.service")), self.logs / "gate.log")
        self.wait(lambda: self.health(self.door))

    def node(self, name: str, config: str, key: Path) -> subprocess.Popen[bytes]:
        """A SuperNode with a folder and a key of its own; config: text of its node.toml."""
        home, words = self.supernode(name, config, key)
        return self.processes.start(words, self.log(name), FLWR_HOME=str(home), OMP_NUM_THREADS="1")

    def worker(self, name: str) -> subprocess.Popen[bytes]:
        """That of a node that was started."""
        words = self.moved(command("spry-worker.service"))
        return self.processes.start(words, self.log(f"{name}-worker"), FLWR_HOME=str(self.folder / name))

    def supernode(self, name: str, config: str, key: Path) -> tuple[Path, list[str]]:
        """Its folder, and the unit's command in it."""
        box = self.folder / name
        box.mkdir()
        (box / "node.toml").write_text(config)
        words = command("spry-supernode.service")
        for old, new in {
            "/etc/spry/node.toml": box / "node.toml",
            "/etc/spry/node.key": key,
            "9094": free_port(),
        }.items():
            words = [str(new) if word == old else word for word in words]
        return box, self.moved(words, SUPERLINK=f"{HOST}:{self.door}")

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def health(self, port: int) -> bool:
        return self.status(port, "GET", "/health") == 200

    def status(self, port: int, method: str, path: str) -> int:
        """HTTP status over TLS that trusts this deployment's CA only; 0 where nothing answers."""
        trust = ssl.create_default_context(cafile=self.etc / "ca.crt")
        connection = HTTPSConnection(HOST, port, timeout=5.0, context=trust)
        with contextlib.closing(connection):
            try:
                connection.request(method, path, body=b"")
                return connection.getresponse().status
            except (OSError, HTTPException):
                return 0

    def wait(self, true: Any, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not true():
            said = "\n".join(path.read_text()[-2000:] for path in self.logs.glob("*.log"))
            assert time.monotonic() < deadline, said
            time.sleep(0.1)


@contextlib.contextmanager
def deployment(folder: Path) -> Iterator[Deployment]:
    """A running server; everything that it or the test has started is stopped."""
    deployed = Deployment(folder)
    try:
        with deployed.processes:
            deployed.start()
            yield deployed
    finally:
        for home in filter(Path.is_dir, folder.iterdir()):  # workers outlive the SuperNodes whose messages started them
            default_place(home).stop()
