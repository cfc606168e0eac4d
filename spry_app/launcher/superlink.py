"""A SuperLink of our own: home, free port, environment, submission, and the true status of a run.

Flower's own `flwr run` would start one that outlives it, share it with strangers, install our dependencies again for
every run, and exit 0 when the run failed.
"""

import json
import os
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from spry_app.config import Scalar
from spry_app.errors import SpryError
from spry_app.launcher.logs import last_lines, plain
from spry_app.launcher.processes import Processes

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Outcome:
    """How a run stands, as the SuperLink knows it."""

    status: str
    details: str = ""

    @property
    def finished(self) -> bool:
        return self.status.startswith("finished")

    @property
    def completed(self) -> bool:
        return self.status == "finished:completed"


def environment(folder: Path) -> dict[str, str]:
    """Environment for every Flower process that keeps its things in `folder`, works offline and tells nobody."""
    local = f"{HOST},localhost"
    return os.environ | {
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "RAY_ADDRESS": "local",
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), local])),
        "no_proxy": ",".join(filter(None, [os.environ.get("no_proxy"), local])),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class SuperLink:
    """One SuperLink and the runs given to it; `processes` stops it."""

    def __init__(self, processes: Processes, logs: Path) -> None:
        self._processes = processes
        self._logs = logs
        self.process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.log = logs / "superlink.log"

    def start(self, *options: str, timeout_s: float = 60.0) -> None:
        """Start it and wait until it answers. `options`: further ones of `flower-superlink`, e.g. --simulation."""
        home = Path(self._processes.environment["FLWR_HOME"])
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "spry"\n\n[superlink.spry]\naddress = "{HOST}:{self.port}"\ninsecure = true\n'
        )
        command = ["flower-superlink", "--insecure", "--host", HOST, "--port", str(self.port), *options]
        self.process = self._processes.start(command, self.log)
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SpryError(f"Flower's SuperLink did not start on {HOST}:{self.port}.\n{last_lines(self.log)}")
            time.sleep(0.05)
        self._processes.note_descendants()

    def submit(self, app: Path, run_config: Mapping[str, Scalar], federation: Mapping[str, Scalar]) -> str:
        """Hand over the app with `flwr run`; returns the run id."""
        command = ["flwr", "run", str(app.resolve()), "--format", "json"]
        for option, values in {"run-config": run_config, "federation-config": federation}.items():
            if values:
                command += [f"--{option}", str(write_settings(self._logs / f"{option}.toml", values))]
        answer = self._flwr(command)
        if not answer.get("run-id"):
            raise SpryError(f"Flower did not accept the app in {app}: {reason_of(answer)}")
        return str(answer["run-id"])

    def status(self, run_id: str) -> Outcome:
        answer = self._flwr(["flwr", "ls", "--run-id", run_id, "--format", "json"])
        if not answer.get("runs"):
            return Outcome("finished:failed", f"The SuperLink stopped answering.\n{last_lines(self.log)}")
        run = answer["runs"][0]
        return Outcome(str(run["status"]), str(run["status-details"]))

    def follow(self, run_id: str, log: Path, look: Callable[[], None], pause_s: float = 0.2) -> Outcome:
        """Wait for the end of the run with its log written to `log`, calling `look` again and again."""
        stream = self._processes.start(["flwr", "log", run_id, "--stream"], log)
        while stream.poll() is None:
            look()
            time.sleep(pause_s)
        while not (outcome := self.status(run_id)).finished:
            look()
            time.sleep(1.0)
        look()
        return outcome

    def _answers(self) -> bool:
        connection = HTTPConnection(HOST, self.port, timeout=1.0)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def _flwr(self, command: list[str]) -> dict[str, Any]:
        return answer_of(self._processes.call(command))


def answer_of(text: str) -> dict[str, Any]:
    """What `flwr` said with --format json; in "error-message" where it did not keep to that."""
    try:
        return dict(json.loads(text))
    except ValueError:
        return {"error-message": plain(text)}


def reason_of(answer: Mapping[str, Any]) -> str:
    """The last line of why it says no."""
    return str(answer.get("error-message", answer)).strip().splitlines()[-1]


def write_settings(path: Path, values: Mapping[str, Scalar]) -> Path:
    """A file for `--run-config`, `--federation-config` or `--node-config`, free of the quoting that a line needs.

    JSON writes scalars as TOML does.
    """
    path.write_text("".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()))
    return path
