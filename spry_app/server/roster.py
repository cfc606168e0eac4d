"""Who is in a run and who trained what, written down: run.json (versions, units, nodes, why it failed), and a line a
round in assignments.jsonl. Of the nodes of a run that promises privacy nothing is kept.
"""

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spry_app.atomic import write_whole
from spry_app.config import RunConfig
from spry_app.methods import Method
from spry_app.protocol import Introduction, Task
from spry_app.server.devices import kept

Labels = tuple[tuple[str, ...], list[list[int]]]
"""Names of the labels, and of every shard its rows of each."""
_PACKAGES = ("spry", "flwr", "torch", "transformers", "peft", "bitsandbytes", "datasets")
_ABOUT = "run.json"


class Roster:
    """The two files of a run. after: the round after which it goes on; None for one that begins."""

    def __init__(self, folder: Path, config: RunConfig, after: int | None = None) -> None:
        self._folder, self._path, self._secret = folder, folder / "assignments.jsonl", bool(config.privacy.mode)
        self.labels: Callable[[int], Labels | None] = lambda shards: None
        """Of so many shards of the run's data, where it is known that nodes hold just those."""
        machine = {"python": platform.python_version(), "platform": platform.platform()}
        self._about: dict[str, Any] = {
            "versions": machine | versions(),
            "started": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        }
        self._tasks: Mapping[int, Task] = {}
        self._method: Method | None = None
        self._used: dict[int, int] = {}
        self._path.write_text("" if after is None else _until(self._path, after))
        self._write()

    def asked(
        self, tasks: Mapping[int, Task], units: Iterable[str], introduced: Mapping[int, Introduction], method: Method
    ) -> None:
        """What each node of the round is to train. introduced: all nodes that can be used."""
        if self._secret:
            return
        self._tasks, self._method, self._used = tasks, method, {}
        if {str(node) for node in introduced} != {node["node"] for node in self._about.get("nodes", ())}:
            self._about |= {"units": list(units), **self._nodes(introduced)}
            self._write()

    def used(self, steps: Mapping[int, int]) -> None:
        """Whose replies were: places among the round's clients, with the local steps that each did."""
        self._used = dict(steps)

    def end(self, round_: int) -> None:
        """Write the round down; one that asked nobody leaves nothing."""
        places = {unit: place for place, unit in enumerate(self._about.get("units", ()))}
        hands: dict[tuple[tuple[int, ...], str, int], dict[str, list[Any]]] = {}
        for node, task in self._tasks.items():
            key = (tuple(places[unit] for unit in task.units), *self._way(task))
            hand = hands.setdefault(key, {"nodes": [], "used": [], "steps": []})
            hand["nodes"].append(str(node))
            if task.client in self._used:
                hand["used"].append(str(node))
                hand["steps"].append(self._used[task.client])
        self._tasks = {}
        if hands:
            told = [
                {"units": units, "gradient": gradient, "directions": directions, **hand}
                for (units, gradient, directions), hand in hands.items()
            ]
            line = {"round": round_, "hands": told}
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _way(self, task: Task) -> tuple[str, int]:
        """Name of the gradient, and its directions a batch; 0 where it is exact."""
        assert self._method is not None
        gradient = self._method.taking(task.gradient).gradient
        return gradient.name, task.directions if gradient.slopes else 0

    def _nodes(self, introduced: Mapping[int, Introduction]) -> dict[str, Any]:
        """What they said of themselves, and of each its rows by label, where those follow from its number."""
        nodes: list[dict[str, Any]] = []
        for node, said in sorted(introduced.items(), key=lambda item: (item[1].partition, item[0])):
            told = asdict(said)
            rows = {name: told[name] for name in ("partition", "examples", "heldout")}
            nodes.append({"node": str(node), **rows, **kept(said)})
        found = self.labels(len(nodes))
        if found is None or not _agree(nodes, found[1]):
            return {"nodes": nodes}
        names, counts = found
        return {"label-names": names, "nodes": [{**node, "labels": counts[node["partition"]]} for node in nodes]}

    def _write(self) -> None:
        write_whole(self._folder / _ABOUT, json.dumps(self._about) + "\n")


def failed(folder: Path, why: str) -> None:
    """Keep why a run failed, if it had begun."""
    path = folder / _ABOUT
    with suppress(OSError, ValueError):  # what is told must not hide what it tells of
        write_whole(path, json.dumps({**json.loads(path.read_text()), "failed": why}) + "\n")


def _agree(nodes: Sequence[Mapping[str, Any]], counts: Sequence[Sequence[int]]) -> bool:
    """Whether nodes have as many rows as the shards of their numbers."""
    numbers = [node["partition"] for node in nodes]
    return sorted(numbers) == list(range(len(counts))) and all(
        node["examples"] + node["heldout"] == sum(counts[node["partition"]]) for node in nodes
    )


def _until(path: Path, last: int) -> str:
    """The lines to a round; a file that was lost or cut short costs no run."""
    kept = []
    with suppress(OSError, ValueError, LookupError, TypeError):
        kept = [line for line in path.read_text().split("\n")[:-1] if json.loads(line)["round"] <= last]
    return "".join(line + "\n" for line in kept)


def versions() -> dict[str, str]:
    """Package -> version, of those that a result depends on."""
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
