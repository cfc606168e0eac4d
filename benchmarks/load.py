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

import psutil

from spry_app.autodiff.memory import MIB
from spry_app.errors import SpryError

ROLES = {"server": "flwr-simulation", "clients": "ray::ClientAppActor", "superlink": "flower-superlink"}
"""What to find in the command line of a process; the ServerApp and Flower's simulation share one."""
SETTINGS = {
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
    answer = grown(readings)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    whole = {"settings": settings, "readings": [asdict(one) for one in readings], "answer": answer}
    (options.out / "load.json").write_text(json.dumps(whole, indent=1) + "\n")
    print(f"The server's memory from round {answer['from']} to {answer['to']}: {answer['mib']:+.1f} MiB")


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


def grown(readings: Sequence[Reading]) -> dict[str, float]:
    """Of the server, in MiB, between the first fifth of the rounds, by when all is loaded, and the last."""
    first, last = readings[len(readings) // 5], readings[-1]
    return {"from": first.round, "to": last.round, "mib": round(last.mib["server"] - first.mib["server"], 1)}


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
