"""python -m benchmarks.message: what does a message cost a node beside Flower's own part of it?

A SuperNode starts a process for each message. Here that process answers the question of what a node has, with MiniLM
and the embedded rows: by itself, by a worker that it has to start, and by one that is warm. What a ClientApp that does
nothing takes is Flower's part.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.common.serde import context_to_proto, message_to_proto

from benchmarks.local_grid import identify
from benchmarks.measure import ROOT, facts
from benchmarks.summary import print_table
from spry_app.autodiff.memory import MIB
from spry_app.config import RunConfig, Scalar
from spry_app.data import label_names
from spry_app.models import load_model
from spry_app.protocol import introduction_request
from spry_app.worker.ask import health
from spry_app.worker.place import Place, default_place

QUESTION = "What does a message cost a node beside Flower's own part of it?"


@dataclass(frozen=True)
class Case:
    """app: of the messenger. worker: client.worker. before: what is done to the worker before each message."""

    app: str
    worker: str = "auto"
    before: Callable[[Place], object] = health


CASES = {
    "Flower alone": Case("flower"),
    "warm worker": Case("spry"),
    "cold worker": Case("spry", before=Place.stop),
    "no worker": Case("spry", "off"),
}


@dataclass(frozen=True)
class Cost:
    """Of a process from its start to its end. mib: resident at its worst, without its worker."""

    seconds: float
    mib: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as folder:
        found = measure(Path(folder), options.rounds)
    base = statistics.median(cost.seconds for cost in found["Flower alone"])
    rows = {}
    for name, costs in found.items():
        seconds = statistics.median(cost.seconds for cost in costs)
        rows[name] = {"seconds": seconds, "beside": seconds - base, "mib": max(cost.mib for cost in costs)}
    head = ("", "process, s", "beside Flower's, s", "its memory, MiB")
    print_table(
        QUESTION, head, [(n, f"{r['seconds']:.2f}", f"{r['beside']:.2f}", f"{r['mib']:.0f}") for n, r in rows.items()]
    )
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"rows": rows, "rounds": options.rounds, "facts": facts("cpu")}
    (options.out / "message.json").write_text(json.dumps(record, indent=1) + "\n")


def measure(folder: Path, rounds: int) -> dict[str, list[Cost]]:
    """The cases take turns, so that noise is shared."""
    place, environment = default_place(folder), os.environ | {"FLWR_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    files = {worker: write(folder / worker, {"client.worker": worker}) for worker in ("auto", "off")}
    found: dict[str, list[Cost]] = {name: [] for name in CASES}
    try:
        for turn in range(rounds + 1):
            for name, case in CASES.items():
                case.before(place)
                cost = one(case.app, files[case.worker], environment)
                if turn:  # the first turn warms the system's caches, and starts a worker
                    found[name].append(cost)
    finally:
        place.stop()
    return found


def one(app: str, file: Path, environment: dict[str, str]) -> Cost:
    """One message, from the start of its process to the end."""
    command = [sys.executable, "-m", "benchmarks.messenger", app, str(file)]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    seconds = time.monotonic() - started
    if done.returncode:
        sys.exit(f"error: the process of a message failed:\n{done.stderr}")
    told = json.loads(done.stdout.splitlines()[-1])
    if app == "spry" and "introduction" not in told["records"]:
        sys.exit(f"error: the node refused: {told['records']}")
    return Cost(seconds, told["peak-kib"] * 1024 / MIB)


def write(path: Path, settings: dict[str, Scalar]) -> Path:
    """A message and the context of a node, as the messenger reads them."""
    identify()
    keys = RunConfig.defaults() | {"preset": ""} | settings
    config = RunConfig.from_flower(keys)
    names = label_names(config.data)
    fingerprint = load_model(config.model, config.adapter, len(names), config.seed).fingerprint
    own: dict[str, Scalar] = {"partition-id": 0, "num-partitions": 10}
    context = Context(run_id=1, node_id=1, node_config=own, state=RecordDict(), run_config=dict(keys))
    message = message_to_proto(introduction_request(1, fingerprint))
    raw = (message.SerializeToString(), context_to_proto(context).SerializeToString())
    path.write_bytes(b"".join(len(body).to_bytes(4, "big") + body for body in raw))
    return path


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--rounds", type=int, default=7, help="messages of each kind; medians are told")
    found.add_argument("--out", type=Path, default=Path("outputs/message"), help="message.json")
    return found


if __name__ == "__main__":
    main()
