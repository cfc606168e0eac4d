"""A server and nodes on loopback to be broken on purpose: starting, watching and killing by process id. What is broken
and what must come of it is in faults.py.
"""

import itertools
import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil
from federation import DEPLOYED, make_checkpoint, make_rows

from spry_app.config import Scalar
from spry_app.launcher.logs import Tail, cause, read
from spry_app.launcher.processes import Processes
from spry_app.launcher.superlink import HOST, Outcome, SuperLink, free_port, write_settings
from spry_app.worker.place import Place, default_place

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 4
SETTINGS: dict[str, Scalar] = DEPLOYED | {
    "num-server-rounds": ROUNDS,
    "server.evaluate-every": 10,
    "server.round-timeout-s": 150.0,
}


class Broken(AssertionError):
    """A promise that was not kept."""


def promise(kept: object, sentence: str) -> None:
    if not kept:
        raise Broken(sentence)


@dataclass(frozen=True)
class Row:
    """seconds: that the run took more than its rounds take. rounds: that nobody's work came of. usual_s: of a round."""

    happened: str
    seconds: float
    rounds: int
    usual_s: float


@dataclass
class Node:
    """A SuperNode with a home of its own. command: that starts it again."""

    home: Path
    command: list[str]
    log: Path
    process: Popen[bytes]
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def worker(self) -> Place:
        return default_place(self.home)

    def client(self) -> psutil.Process | None:
        """The process that Flower has started for the message of now."""
        return next(_flower("flwr-clientapp", self.home), None)


class Ground:
    """`superlink` with `options` and the nodes that are started on it. address: where nodes call it."""

    def __init__(self, folder: Path, processes: Processes, superlink: SuperLink, options: list[str]) -> None:
        self.folder, self.processes, self.superlink, self.options = folder, processes, superlink, options
        self.nodes: dict[str, Node] = {}
        self.logs = folder / "logs"
        self.model = make_checkpoint(folder / "tiny")
        self.test = make_rows(folder / "test.jsonl", 40, offset=5000)

    def rows(self, name: str) -> Path:
        """The node's own file."""
        path = self.folder / f"{name}.jsonl"
        return path if path.exists() else make_rows(path, 64, offset=1000 * len(self.nodes))

    def node(self, name: str, **config: Scalar) -> Node:
        """Start one that has rows of its own."""
        home = self.folder / name
        home.mkdir()
        settings = {"data": str(self.rows(name)), **config}
        command = ["flower-supernode", "--insecure", "--superlink", f"{HOST}:{self.superlink.port}"]
        command += ["--port", str(free_port())]
        command += ["--node-config", str(write_settings(home / "node-config.toml", settings))]
        return self.adopt(name, home, command)

    def adopt(self, name: str, home: Path, command: list[str]) -> Node:
        variables = {"FLWR_HOME": str(home), "OMP_NUM_THREADS": "1"}
        log = self.logs / f"{name}.log"
        self.nodes[name] = Node(home, command, log, self.processes.start(command, log, **variables), variables)
        return self.nodes[name]

    def restart(self, node: Node) -> None:
        node.process = self.processes.start(node.command, node.log, **node.variables)

    def submit(self, **settings: Scalar) -> "Run":
        keys = SETTINGS | {
            "model.name": str(self.model),
            "data.source": str(self.test),
            "data.test": str(self.test),
            "output-dir": str(self.folder / "outputs"),
        }
        keys |= settings
        run_id = self.superlink.submit(ROOT, keys, {})
        folder = Path(str(keys.get("resume") or Path(str(keys["output-dir"]), run_id)))
        return Run(self, run_id, folder, keys)

    def server_app(self) -> psutil.Process | None:
        """The process that Flower has started for the run of now."""
        return next(_flower("flwr-serverapp", Path(self.processes.environment["FLWR_HOME"])), None)

    def remove(self, name: str) -> None:
        """A node that says goodbye."""
        node = self.nodes.pop(name)
        kill(node.process, signal.SIGTERM)
        node.process.wait()
        node.worker.stop()

    def kill_superlink(self) -> None:
        """And what Flower has started beside it is left to itself."""
        server = self.superlink.process
        kill(server)
        server.wait()

    def heal(self) -> None:
        """After a fault that went otherwise than it should: no run, and every node there."""
        if (app := self.server_app()) is not None:
            kill(app)
        for node in self.nodes.values():
            if (pid := node.worker.process()) is not None:
                kill(pid, signal.SIGCONT)
            if node.process.poll() is not None:
                self.restart(node)

    def stop(self) -> None:
        for node in self.nodes.values():
            if (pid := node.worker.process()) is not None:
                os.kill(pid, signal.SIGCONT)
            node.worker.stop()


class Run:
    """A run as it goes. rounds: the lines of metrics.jsonl; seen: the moment of each."""

    def __init__(self, ground: Ground, run_id: str, folder: Path, keys: dict[str, Scalar]) -> None:
        self.ground, self.id, self.folder, self.keys = ground, run_id, folder, keys
        self.rounds: list[dict[str, Any]] = []
        self.seen: list[float] = []
        self.repeated = 0
        self.after = 0
        self.log = ground.logs / f"run-{run_id}.log"
        self._tail = Tail(folder / "metrics.jsonl")
        list(self._tail.new_lines())  # those of the run that is resumed
        self._stream = ground.processes.start(["flwr", "log", run_id, "--stream"], self.log)

    def goes_on(self, before: "Run") -> None:
        """Count from that run's beginning. Its last round, which did not end, has been run again."""
        self.after, self.repeated = before.rounds[-1]["round"], before.repeated + 1
        self.rounds, self.seen = before.rounds + self.rounds, before.seen + self.seen

    def look(self) -> None:
        for line in self._tail.new_lines():
            self.rounds.append(json.loads(line))
            self.seen.append(time.monotonic())

    def until(self, true: Callable[[], object], what: str, timeout_s: float = 240.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not true():
            promise(time.monotonic() < deadline, f"{what}: not in {timeout_s:g} s\n{self.said()}")
            self.look()
            time.sleep(0.1)

    def wait(self, seconds: float) -> None:
        """While nothing of this ground may end."""
        over = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > over, f"{seconds:g} s", seconds + 60.0)

    def until_round(self, number: int, timeout_s: float = 300.0) -> None:
        """Until that round has ended."""
        self.until(lambda: self.rounds and self.rounds[-1]["round"] >= number, f"end of round {number}", timeout_s)

    def until_training(self, node: Node) -> None:
        self.until(node.worker.at_work.exists, f"{node.home.name} trains")

    def end(self, timeout_s: float = 420.0) -> Outcome:
        """As the SuperLink has it."""
        self.until(lambda: self._stream.poll() is not None, "the run's end", timeout_s)
        outcome = self.ground.superlink.status(self.id)
        deadline = time.monotonic() + timeout_s
        while not outcome.finished:
            promise(time.monotonic() < deadline, f"the run's end: not in {timeout_s:g} s; {outcome}")
            time.sleep(1.0)
            outcome = self.ground.superlink.status(self.id)
        self.look()
        return outcome

    def completed(self) -> None:
        outcome = self.end()
        promise(outcome.completed, f"the run completes; {outcome.status}: {cause(outcome.details, self.log)}")

    def said(self) -> str:
        return "\n".join(read(self.log).splitlines()[-25:])

    def round(self, number: int) -> dict[str, Any]:
        return next(line for line in self.rounds if line["round"] == number)

    def took_s(self, number: int) -> float:
        return self._durations()[number - 2]

    def usual_s(self) -> float:
        """Of a round after the first, in which models are loaded."""
        return statistics.median(self._durations())

    def back(self, number: int) -> int:
        """The first round after `number` in which nobody was missing."""
        return next(n["round"] for n in self.rounds if n["round"] > number and n["answered"] >= 2 and not n["reasons"])

    def row(self, happened: str) -> Row:
        durations = self._durations()
        lost = sum(durations) - len(durations) * self.usual_s()
        without = sum(line["answered"] == 0 for line in self.rounds[1:])
        return Row(happened, max(0.0, lost), without + self.repeated, self.usual_s())

    def _durations(self) -> list[float]:
        """Seconds of round 2 and those that follow."""
        return [later - earlier for earlier, later in itertools.pairwise(self.seen[1:])]


def kill(process: int | psutil.Process | Popen[bytes], number: signal.Signals = signal.SIGKILL) -> float:
    """One process, by its id; returns the moment."""
    pid = process if isinstance(process, int) else process.pid
    os.kill(pid, number)
    return time.monotonic()


@contextmanager
def standing_still(run: Run, node: Node) -> Iterator[None]:
    """The node's worker, from the middle of its steps in round 2 on."""
    run.until_round(1)
    run.until_training(node)
    stopped = node.worker.process()
    kill(stopped, signal.SIGSTOP)
    try:
        yield
    finally:
        kill(stopped, signal.SIGCONT)


def _flower(command: str, home: Path) -> Iterator[psutil.Process]:
    """Processes that run this command of Flower's with this FLWR_HOME."""
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if any(word.endswith(command) for word in words) and process.environ().get("FLWR_HOME") == str(home):
                yield process
        except psutil.Error:
            continue
