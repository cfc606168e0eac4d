"""What a run promises of its clients' rows, round by round: who is drawn, what the mean is made of, what it has cost.
The mechanism is in the room `privacy`, the arithmetic of epsilon in accountant.py; what clients do is in their room.
"""

import dataclasses
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from logging import INFO
from pathlib import Path

import torch
from flwr.app import ArrayRecord
from flwr.common.logger import log

from spry_app.autodiff.directions import Tensors
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import Method
from spry_app.methods.global_state import GlobalState, mean_change
from spry_app.privacy import Secret, bounded, noisy
from spry_app.protocol import Task, TrainReply
from spry_app.server.accountant import Release, accounting, epsilon
from spry_app.server.record import Recorder
from spry_app.server.stopping import Stopped
from spry_app.slope_log import Entry, Measured

Accepted = list[tuple[Task, TrainReply]]
Changes = Sequence[tuple[Tensors, int]]


class Guard:
    """Promises nothing, and leaves everything as it is."""

    logs_slopes = True
    """Whether the scalars of a round may be written down."""

    def __init__(
        self, config: RunConfig, method: Method, state: GlobalState, units: Mapping[str, Sequence[str]], to: Recorder
    ) -> None:
        self.config, self.method, self.state, self.units, self.recorder = config, method, state, units, to

    def order(self, round_: int, nodes: int) -> list[int] | None:
        """Of the nodes, from which the first so many are drawn; None where the seed of the run draws them."""
        return None

    def begin(self, tasks: Mapping[int, Task], nodes: int, arrays: ArrayRecord, alike: bool) -> None:
        """Before a round's tasks are sent. nodes: from which their clients were drawn. alike: their tasks do not depend
        on which of them those are. arrays: with which the run ends if the round would be one too many.
        """

    def replies(self, accepted: Accepted) -> Accepted:
        """As they enter the mean."""
        return accepted

    def released(self, entry: Entry) -> Entry:
        """The scalars of the round as the mean is made of them and clients may see them."""
        return entry

    def mean(self, accepted: Accepted, as_they_are: Changes, rebuilt: Changes) -> Tensors:
        """Of the clients' changes. rebuilt: by the scalars, of those clients or groups that have any."""
        return mean_change(as_they_are) | mean_change(rebuilt)


class Accounted(Guard):
    """Counts what rounds cost. Every client has one vote, as it has one bound."""

    def __init__(
        self, config: RunConfig, method: Method, state: GlobalState, units: Mapping[str, Sequence[str]], to: Recorder
    ) -> None:
        super().__init__(config, method, state, units, to)
        accounting()  # a run that could not say what it costs does not begin
        self.releases = self.before()
        self.multiplier = config.privacy.noise_multiplier / (2 * math.sqrt(self._parts()))

    def _parts(self) -> int:
        """Kinds of numbers with a bound of their own. Two, each with noise in units of its bound, are one mechanism
        whose bound is sqrt(2) of them.
        """
        return 2 if self.method.reply == "slopes" and self.state.exact else 1

    def before(self) -> list[Release]:
        """What a run that goes on has cost."""
        raise NotImplementedError

    def release(self, nodes: int, clients: int, alike: bool) -> Release:
        raise NotImplementedError

    def begin(self, tasks: Mapping[int, Task], nodes: int, arrays: ArrayRecord, alike: bool) -> None:
        now, privacy = self.recorder.current, self.config.privacy
        release = self.release(nodes, len(tasks), alike)
        spent, most = self._epsilon([*self.releases, release]), privacy.max_epsilon
        reason = f"privacy.max-epsilon {most:g} does not allow"
        if most and spent > most:
            if not self.releases:
                raise SpryError(
                    f"The first round has an epsilon of {spent:.4g}, more than privacy.max-epsilon={most:g}: raise "
                    f"privacy.noise-multiplier (now {privacy.noise_multiplier:g}) or the limit."
                )
            self.recorder.stopped = self.recorder.stopped or f"{reason} round {now.round}"
            raise Stopped(self.recorder.stopped, arrays)
        if not self.recorder.promised:
            self._promise(release, now.round)
        self.releases.append(release)
        now.epsilon, now.sampled_from = spent, release.population
        if most and self._epsilon([*self.releases, release]) > most:
            self.recorder.stopped = self.recorder.stopped or f"{reason} another round after {now.round}"

    def _promise(self, release: Release, round_: int) -> None:
        """Say what the run will have cost in the end."""
        privacy, rounds = self.config.privacy, self.config.num_server_rounds
        left = rounds - round_ + 1
        after = self._epsilon([*self.releases, *[release] * left])
        shares = f"{release.clients} of {release.population} clients a round, drawn secretly"
        self.recorder.promised = (
            f"privacy.mode={privacy.mode!r}: epsilon {after:.4g} at delta {privacy.delta:g} after {rounds} rounds, for "
            "any two data sets that differ in one client ("
            + (shares if release.clients < release.population else "each counted as if it took part in every round")
            + ")."
        )
        log(INFO, "%s", self.recorder.promised)
        if privacy.delta * release.population >= 1:
            self.recorder.warn(
                f"privacy.delta={privacy.delta:g} is not below one over the number of clients ({release.population}): "
                "a mechanism that publishes one client's rows would pass."
            )

    def _epsilon(self, releases: Sequence[Release]) -> float:
        return epsilon(releases, self.multiplier, self.config.privacy.delta)

    def replies(self, accepted: Accepted) -> Accepted:
        self.recorder.current.train_loss = None  # clients keep theirs
        return [(task, dataclasses.replace(reply, examples=1)) for task, reply in accepted]


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
        """How many clients were asked, a line for each time."""
        return self.recorder.folder / "asked.txt"

    def release(self, nodes: int, clients: int, alike: bool) -> Release:
        return Release(clients, clients)

    def begin(self, tasks: Mapping[int, Task], nodes: int, arrays: ArrayRecord, alike: bool) -> None:
        super().begin(tasks, nodes, arrays, alike)
        with self._asked.open("a") as file:
            file.write(f"{len(tasks)}\n")
            file.flush()
            os.fsync(file.fileno())


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

    def release(self, nodes: int, clients: int, alike: bool) -> Release:
        return Release(nodes if alike else clients, clients)

    def begin(self, tasks: Mapping[int, Task], nodes: int, arrays: ArrayRecord, alike: bool) -> None:
        super().begin(tasks, nodes, arrays, alike)
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


GUARDS: dict[str, Callable[..., Guard]] = {"": Guard, "local": Local, "central": Central}
"""privacy.mode -> what keeps its promise on the server."""


def _group(measured: Measured) -> tuple[int, tuple[int, ...]]:
    """Of those whose slopes are summed (methods.global_state.merged)."""
    return measured.client, measured.units


def _within(slopes: tuple[tuple[float, ...], ...], most: float) -> tuple[tuple[float, ...], ...]:
    if not slopes:
        return slopes
    found = bounded({"slopes": torch.tensor(slopes, dtype=torch.float64)}, most)["slopes"]
    return tuple(map(tuple, found.tolist()))
