"""What a run promises of its clients' rows, round by round: who is drawn, what the mean is made of, what it has cost.
The mechanism is in the room `privacy`, the count in guard.py; what clients do is in their room.
"""

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from flwr.app import ArrayRecord

from spry_app.autodiff.directions import Tensors
from spry_app.config import RunConfig
from spry_app.methods import Method
from spry_app.methods.global_state import GlobalState, mean_change
from spry_app.methods.replay import passes
from spry_app.privacy import Secret, bounded, noisy
from spry_app.protocol import Task
from spry_app.server.accountant import Release
from spry_app.server.fleet import Fleet
from spry_app.server.guard import Accepted, Accounted, Changes, Guard
from spry_app.server.record import Recorder
from spry_app.slope_log import Entry, Measured


class Local(Accounted):
    """Clients have added the noise themselves: whatever the server makes of replies costs nothing more. It knows whom
    it asks, so each client counts as if it were asked every round; and a round that it had begun when it was ended
    counts too, as it may be begun again with other tasks.
    """

    def before(self) -> list[Release]:
        path = self._asked
        lines = path.read_text().splitlines() if path.exists() else []
        return [Release(clients, clients) for clients in map(int, lines)]

    @property
    def _asked(self) -> Path:
        """How many clients were asked, a line for each round that was begun."""
        return self.recorder.folder / "asked.txt"

    def release(self, clients: int, nodes: Sequence[int], fleet: Fleet) -> Release:
        return Release(clients, clients)

    def begin(self, tasks: Mapping[int, Task], nodes: Sequence[int], arrays: ArrayRecord, fleet: Fleet) -> None:
        super().begin(tasks, nodes, arrays, fleet)
        with self._asked.open("a") as file:
            file.write(f"{self._line(self.releases[-1])}\n")
            file.flush()
            os.fsync(file.fileno())

    def _line(self, release: Release) -> int:
        return release.clients


class Examples(Local):
    """Clients have added the noise in each of their steps, to what their rows say one by one. A row is in one batch of
    each pass over its client's rows; all count as if in every round they were asked, and rows of the smallest client.

    The order of batches follows from the seed of the run, so that a row is not hidden among those not drawn. How many
    rows a client has is public: they are its weight.
    """

    unit = "example"

    def before(self) -> list[Release]:
        return [Release(1, 1, release.clients) for release in super().before()]

    def _parts(self) -> int:
        return 2 if self.state.exact else 1

    def release(self, clients: int, nodes: Sequence[int], fleet: Fleet) -> Release:
        rows = fleet.examples(nodes)
        return Release(sum(rows), sum(rows), passes(min(rows), self.method, self.config.client))

    def counted(self, release: Release) -> str:
        batches = "one batch" if release.times == 1 else f"{release.times} batches"
        return f"each counted as if it were in {batches} of every round"

    def begin(self, tasks: Mapping[int, Task], nodes: Sequence[int], arrays: ArrayRecord, fleet: Fleet) -> None:
        super().begin(tasks, nodes, arrays, fleet)
        self.recorder.current.sampled_from = len(tasks)

    def replies(self, accepted: Accepted) -> Accepted:
        self.recorder.current.train_loss = None  # clients keep theirs
        return accepted

    def _line(self, release: Release) -> int:
        """A row's batches in the round take the place of clients."""
        return release.times


class Central(Accounted):
    """Adds the noise to the sum of the replies, and divides by how many were asked, whoever answers: one client then
    moves the sum by its bound at the most, and nothing else depends on its rows.

    Tensors leave the server once they are in its checkpoint, so a round that was ended before has told nobody anything.
    Where all clients measure along the same directions, their slopes are summed; else their changes are, those that the
    server rebuilds from slopes too, and the slopes are not kept.
    """

    def __init__(
        self, config: RunConfig, method: Method, state: GlobalState, units: Mapping[str, Sequence[str]], to: Recorder
    ) -> None:
        self._slopes = method.reply == "slopes" and method.seeds == "shared"
        super().__init__(config, method, state, units, to)
        self.logs_slopes = self._slopes
        self._secret = Secret.at(to.folder / "noise.key")
        self._tasks: list[Task] = []

    def _parts(self) -> int:
        return super()._parts() if self._slopes else 1

    def before(self) -> list[Release]:
        return [Release(r.sampled_from, r.asked) for r in self.recorder.rounds if r.sampled_from is not None]

    def order(self, round_: int, nodes: int) -> list[int] | None:
        return self._secret.order(nodes, "order", round_)

    def release(self, clients: int, nodes: Sequence[int], fleet: Fleet) -> Release:
        said = set(zip(fleet.memory_mib(nodes), fleet.gradients(nodes), strict=True))
        alike = len(said) <= 1  # else tasks depend on which clients were drawn
        return Release(len(nodes) if alike else clients, clients)

    def begin(self, tasks: Mapping[int, Task], nodes: Sequence[int], arrays: ArrayRecord, fleet: Fleet) -> None:
        super().begin(tasks, nodes, arrays, fleet)
        self._tasks = list(tasks.values())

    def replies(self, accepted: Accepted) -> Accepted:
        accepted = super().replies(accepted)
        if not self._slopes:
            return accepted
        most = self.config.privacy.clip_slopes
        return [(task, dataclasses.replace(reply, slopes=_within(reply.slopes, most))) for task, reply in accepted]

    def released(self, entry: Entry) -> Entry:
        if not self._slopes:
            return entry
        asked = Counter(_group(self.state.measured(t.number, t.sharing, t.units, 1, ())) for t in self._tasks)
        std = self.config.privacy.noise_multiplier * self.config.privacy.clip_slopes
        found = []
        for group in entry.measured:
            total = {"slopes": torch.tensor(group.slopes, dtype=torch.float64) * group.examples}
            told = noisy(total, std, self._secret, "slopes", entry.round, str(_group(group)))["slopes"]
            mean = (told / asked[_group(group)]).tolist()
            found.append(dataclasses.replace(group, slopes=tuple(map(tuple, mean))))
        return Entry(entry.round, tuple(found))

    def mean(self, accepted: Accepted, as_they_are: Changes, rebuilt: Changes) -> Tensors:
        self.recorder.current.noise = None  # of the clients' changes as they are
        by_scalars = itertools.repeat(({}, 1)) if self._slopes else iter(rebuilt)
        changes = [
            change | (next(by_scalars)[0] if reply.slopes else {})
            for (_, reply), (change, _) in zip(accepted, as_they_are, strict=True)
        ]
        told = self._noisy_mean(accepted[0][0].round, changes)
        return told | mean_change(rebuilt) if self._slopes else told

    def _noisy_mean(self, round_: int, changes: Sequence[Tensors]) -> Tensors:
        privacy, total = self.config.privacy, Tensors()
        for change in changes:
            for name, value in bounded(change, privacy.clip).items():
                total[name] = total[name] + value.double() if name in total else value.double()
        asked = Counter(name for task in self._tasks for unit in task.units for name in self.units[unit])
        std = privacy.noise_multiplier * privacy.clip
        told = noisy(total, std, self._secret, "tensors", round_)
        return {name: (value / asked[name]).float() for name, value in told.items()}


GUARDS: dict[tuple[str, str], Callable[..., Guard]] = {
    ("", "client"): Guard,
    ("local", "client"): Local,
    ("local", "example"): Examples,
    ("central", "client"): Central,
}
"""privacy.mode and privacy.unit -> what keeps the promise on the server."""


def _group(measured: Measured) -> tuple[int, tuple[int, ...]]:
    """Of those whose slopes are summed (methods.global_state.merged)."""
    return measured.client, measured.units


def _within(slopes: tuple[tuple[float, ...], ...], most: float) -> tuple[tuple[float, ...], ...]:
    if not slopes:
        return slopes
    found = bounded({"slopes": torch.tensor(slopes, dtype=torch.float64)}, most)["slopes"]
    return tuple(map(tuple, found.tolist()))
