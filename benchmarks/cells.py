"""A cell: one whole run, described by its run config. Cells are run here, beside each other, and kept on disk, so that
an interrupted benchmark goes on where it was. Which cells there are, and what they mean, is not known here.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from flwr.serverapp import Grid

from benchmarks.local_grid import LocalGrid, identify
from benchmarks.watched import WatchedGrid, Work, simulated
from spry_app.client.node import forget_nodes
from spry_app.config import RunConfig, Scalar
from spry_app.config.sections import ModelConfig
from spry_app.errors import SpryError
from spry_app.prefix import Shared, shared
from spry_app.server.run import federate

KEPT = (
    "round",
    "accuracy",
    "loss",
    "personalised-accuracy",
    "train-loss",
    "forwards",
    "mib-up",
    "mib-down",
    "peak-mib",
    "seconds",
    "refused",
)
"""Of every line of metrics.jsonl."""


@dataclass(frozen=True)
class Cell:
    """run_config: the keys that are not at their default. nodes: over which the rows are dealt. own: node config of
    each, none for all alike; what they do is then written down.
    """

    run_config: Mapping[str, Scalar]
    nodes: int
    own: Sequence[Mapping[str, Scalar]] = ()

    @property
    def name(self) -> str:
        """The same for the same cell, whatever the order of its keys, and whether a default is spelt out."""
        usual = RunConfig.defaults()
        keys = sorted(item for item in self.run_config.items() if item not in usual.items())
        told = json.dumps([self.nodes, keys, *([[dict(node) for node in self.own]] if self.own else [])])
        return hashlib.sha256(told.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What a cell gave. curve: a mapping of KEPT for every round, round 0 first, and where nodes have a node config of
    their own "simulated-s" since the start (watched.py). error: why there is none. work: of those nodes.
    """

    curve: tuple[Mapping[str, Any], ...] = ()
    error: str = ""
    seconds: float = 0.0
    commit: str = ""
    config: Mapping[str, Scalar] = field(default_factory=dict)
    """All keys, as they were."""
    work: Sequence[Work] = ()

    @property
    def last(self) -> Mapping[str, Any]:
        return self.curve[-1]


def measure(cell: Cell) -> Outcome:
    """Run the cell in this process, by the server's own `federate` and the real ClientApp."""
    started = time.monotonic()
    forget_nodes()
    watched = WatchedGrid(cell.nodes, cell.run_config, cell.own) if cell.own else None
    grid = watched or LocalGrid(cell.nodes, cell.run_config)
    with tempfile.TemporaryDirectory(prefix="spry-cell-") as folder:
        try:
            config = RunConfig.from_flower(cell.run_config)
            with shared(_known_of(config.model)):
                done = federate(cast(Grid, grid), config, Path(folder))
        except Exception as error:  # told in the record: the other cells go on
            kind = "" if isinstance(error, SpryError) else f"{type(error).__name__}: "
            return Outcome(error=f"{kind}{error}", seconds=time.monotonic() - started)
    lines = [json.loads(line.as_json()) for line in done.recorder.rounds]
    curve = tuple({name: line[name] for name in KEPT} for line in lines)
    if watched:
        curve = tuple(line | {"simulated-s": simulated(watched.work, until=line["round"])} for line in curve)
    seconds = time.monotonic() - started
    return Outcome(curve, seconds=seconds, config=config.flat(), work=tuple(watched.work) if watched else ())


_known: dict[ModelConfig, Shared] = {}
"""What the last model's frozen blocks gave, in this process: other cells send the same rows through them."""


def _known_of(model: ModelConfig) -> Shared:
    if model not in _known:
        _known.clear()
    return _known.setdefault(model, {})


class Cells:
    """Runs cells in `jobs` processes of one thread each, and keeps what they gave in `folder`. Close it when done.

    jobs: 0 runs them in this process. commit: of this code, written into every record.
    """

    def __init__(self, folder: Path, jobs: int, commit: str) -> None:
        self.folder, self.jobs, self.commit = folder, jobs, commit
        self._pool: ProcessPoolExecutor | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, cells: Sequence[Cell], what: str) -> list[Outcome]:
        """The outcome of every cell, in order. Finished ones are read, failed ones tried again."""
        found = {cell.name: outcome for cell in cells if (outcome := self._read(cell)) and not outcome.error}
        left = {cell.name: cell for cell in cells if cell.name not in found}
        _say(f"{what}: {len(left)} runs to do, {len(found)} done before")
        started, done = time.monotonic(), 0
        for name, outcome in self._measured(left):
            found[name], done = self._write(left[name], outcome), done + 1
            _say(f"  {_told(left[name], outcome)}  ({done} of {len(left)}, {time.monotonic() - started:.0f} s)")
        return [found[cell.name] for cell in cells]

    def close(self) -> None:
        """End the processes, and forget what has not begun."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _measured(self, left: Mapping[str, Cell]) -> Iterator[tuple[str, Outcome]]:
        """As they end."""
        if not self.jobs:
            identify()
            yield from ((name, measure(cell)) for name, cell in left.items())
            return
        if self._pool is None and left:
            context = multiprocessing.get_context("spawn")  # Flower, PyTorch and Arrow do not survive a fork
            self._pool = ProcessPoolExecutor(self.jobs, context, _begin, (self.folder / "log.txt",))
        pending = {self._pool.submit(measure, cell): name for name, cell in left.items()} if self._pool else {}
        try:
            for ended in as_completed(pending):
                yield pending[ended], ended.result()
        except BrokenProcessPool as error:
            raise SpryError(
                f"A process that ran cells died (out of memory? see {self.folder / 'log.txt'}). Start the same "
                "command again, with fewer --jobs: finished cells are kept."
            ) from error

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"

    def _read(self, cell: Cell) -> Outcome | None:
        path = self._path(cell)
        if not path.exists():
            return None
        told = json.loads(path.read_text())["outcome"]
        return Outcome(**told | {"curve": tuple(told["curve"]), "work": tuple(told.get("work", ()))})

    def _write(self, cell: Cell, outcome: Outcome) -> Outcome:
        outcome = Outcome(**vars(outcome) | {"commit": self.commit})
        told = {
            "cell": {
                "nodes": cell.nodes,
                "run-config": dict(cell.run_config),
                "own": [dict(node) for node in cell.own],
            },
            "outcome": vars(outcome),
        }
        path = self._path(cell)
        half = path.with_suffix(".half")
        half.write_text(json.dumps(told, indent=1) + "\n")
        half.replace(path)
        return outcome


def _begin(log: Path) -> None:
    """In a new process, which ends with the one that started it: one thread that computes, and everything that
    libraries print goes into a file.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    identify()


def _end_with_parent() -> None:
    """A benchmark that is ended by a signal cannot tell its processes, which would go on with their cells unheard."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _told(cell: Cell, outcome: Outcome) -> str:
    told = str(cell.run_config.get("method", "")) + f" seed {cell.run_config.get('seed', 0)}"
    if outcome.error:
        return f"{told} FAILED: {outcome.error.splitlines()[0]}"
    return f"{told}  loss {outcome.last['loss'] or 0:.4f}  accuracy {outcome.last['accuracy'] or 0:.4f}  " + (
        f"{outcome.seconds:.0f} s"
    )
