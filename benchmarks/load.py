"""python -m benchmarks.load: does the server's memory stay flat while many clients come and go?

A whole `spry run` in processes of its own, with many virtual devices and little work for each; the memory of its
processes is read from outside, once a round.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from spry_app.autodiff.memory import MIB
from spry_app.errors import SpryError

ROLES = {"server": "flwr-simulation", "clients": "ray::ClientAppActor", "superlink": "flower-superlink"}
"""What to find in the command line of a process; the ServerApp and Flower's simulation share one."""
SETTINGS = {
    "preset": "",
    "data.partition": "iid",
    "server.fraction-evaluate": 0.0,
    "client.local-steps": 1,
    "client.batch-size": 2,
    "client.directions": 1,
    "client.directions-at-once": 1,
}
"""Little work for each client: it is the messages that are many."""
EVERY_S = 1.0


@dataclass(frozen=True)
class Reading:
    """After `round` rounds. mib: role -> what its processes have for themselves alone (USS)."""

    round: int
    seconds: float
    mib: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, watch, print."""
    options = _parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    readings = list[Reading]()
    try:
        for one in watch(options.nodes, options.clients, options.rounds, options.method, options.out):
            readings.append(one)
            told = "  ".join(f"{role} {mib:.0f} MiB" for role, mib in one.mib.items())
            print(f"round {one.round:3}  {one.seconds:6.0f} s  {told}", flush=True)
    except SpryError as error:
        sys.exit(f"error: {error}")
    answer = growth(readings, met(newest(options.out)))
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    whole = {"settings": settings, "readings": [asdict(one) for one in readings], "answer": answer}
    (options.out / "load.json").write_text(json.dumps(whole, indent=1) + "\n")
    (per_node, node_error), (per_round, round_error) = answer["node"], answer["round"]
    print(f"Server: {per_round:.2f} ± {round_error:.2f} MiB a round", end=", ")
    print(
        f"beside {per_node:.2f} ± {node_error:.2f} MiB for each device that it has met, whose state Flower keeps there"
    )


def watch(nodes: int, clients: int, rounds: int, method: str, out: Path) -> Iterator[Reading]:
    """A reading whenever a round has ended. Raises SpryError."""
    settings = {**SETTINGS, "method": method, "num-server-rounds": rounds, "server.evaluate-every": rounds}
    settings |= {"server.fraction-train": clients / nodes, "output-dir": str(out.resolve())}
    told = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    command = [sys.executable, "-m", "spry_app.cli", "run", ".", "--nodes", str(nodes), "--run-config", told]
    before, started, last = set(out.iterdir()), time.monotonic(), 0
    family = set[psutil.Process]()  # Ray's processes leave the tree once they run
    with (out / "run.txt").open("w") as text:
        child = subprocess.Popen(command, stdout=text, stderr=subprocess.STDOUT, cwd=Path(__file__).parent.parent)
        try:
            while child.poll() is None:
                time.sleep(EVERY_S)
                with suppress(psutil.NoSuchProcess):
                    family |= set(psutil.Process(child.pid).children(recursive=True))
                done = sum(_lines(folder / "metrics.jsonl") for folder in set(out.iterdir()) - before) - 1
                if done > last:
                    last = done
                    yield Reading(done, round(time.monotonic() - started, 1), memory(family))
        finally:
            child.terminate()
            child.wait()
    if child.returncode:
        raise SpryError(f"The run failed: see {out / 'run.txt'}")


def memory(family: Iterable[psutil.Process]) -> dict[str, float]:
    """Of these processes, by role; of those that have ended, nothing."""
    found = dict.fromkeys(ROLES, 0.0)
    for process in family:
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            role = next((name for name, part in ROLES.items() if part in line), "")
            if role:
                found[role] += process.memory_full_info().uss / MIB
    return {name: round(mib, 1) for name, mib in found.items()}


def newest(out: Path) -> Path:
    """Folder of the run that was begun last."""
    return max((path.parent for path in out.glob("*/metrics.jsonl")), key=lambda folder: folder.stat().st_mtime)


def met(folder: Path) -> list[int]:
    """How many devices have been asked to train by the end of each round of the run in `folder`, from round 1."""
    nodes, found = set[str](), list[int]()
    for line in (folder / "assignments.jsonl").read_text().splitlines():
        nodes |= {node for hand in json.loads(line)["hands"] for node in hand["nodes"]}
        found.append(len(nodes))
    return found


def growth(readings: Sequence[Reading], nodes: Sequence[int]) -> dict[str, tuple[float, float]]:
    """MiB of the server for each node that it has met, and for each round: by least squares, with standard errors.

    nodes: met by the end of each round. The last reading does not count: the server has scored its model by then.
    """
    known = readings[:-1]
    table = np.array([[1.0, nodes[one.round - 1], one.round] for one in known])
    mib = np.array([one.mib["server"] for one in known])
    found = np.linalg.lstsq(table, mib)[0]
    variance = np.sum((mib - table @ found) ** 2) / (len(known) - 3)
    errors = np.sqrt(variance * np.diag(np.linalg.inv(table.T @ table)))
    return {name: (float(found[place]), float(errors[place])) for place, name in enumerate(("node", "round"), 1)}


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--nodes", type=int, default=1000, help="virtual devices")
    found.add_argument("--clients", type=int, default=100, help="asked in a round")
    found.add_argument("--rounds", type=int, default=50, help="of one local step each")
    found.add_argument("--method", default="spry-per-iteration", help="a row of the table")
    found.add_argument("--out", type=Path, default=Path("outputs/load"), help="load.json and the run itself")
    return found


if __name__ == "__main__":
    main()
