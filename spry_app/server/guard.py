"""What every kind of privacy shares on the server: where it has a say in a round, and the count of what rounds cost.
Who is drawn and what the mean is made of is in privacy.py, the arithmetic of epsilon in accountant.py.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from logging import INFO

from flwr.app import ArrayRecord
from flwr.common.logger import log

from spry_app.autodiff.directions import Tensors
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import Method
from spry_app.methods.global_state import GlobalState, mean_change
from spry_app.protocol import Task, TrainReply
from spry_app.server.accountant import Release, accounting, epsilon
from spry_app.server.fleet import Fleet
from spry_app.server.record import Recorder
from spry_app.server.stopping import Stopped
from spry_app.slope_log import Entry

Accepted = list[tuple[Task, TrainReply]]
Changes = Sequence[tuple[Tensors, float]]
"""Of each client, or of one of its units: the tensors that it changed, and what that weighs in their mean."""


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

    def begin(self, tasks: Mapping[int, Task], nodes: Sequence[int], arrays: ArrayRecord, fleet: Fleet) -> None:
        """Before a round's tasks are sent. nodes: from which their clients were drawn. arrays: with which the run ends
        if the round would be one too many.
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

    unit = "client"
    """One of which is replaced."""

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

    def release(self, clients: int, nodes: Sequence[int], fleet: Fleet) -> Release:
        """Of a round of so many clients, drawn from `nodes`."""
        raise NotImplementedError

    def counted(self, release: Release) -> str:
        """As what a unit counts, in words."""
        if release.clients < release.population:
            return f"{release.clients} of {release.population} clients a round, drawn secretly"
        return "each counted as if it took part in every round"

    def begin(self, tasks: Mapping[int, Task], nodes: Sequence[int], arrays: ArrayRecord, fleet: Fleet) -> None:
        now, privacy = self.recorder.current, self.config.privacy
        release = self.release(len(tasks), nodes, fleet)
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
        self.recorder.promised = (
            f"privacy.mode={privacy.mode!r}: epsilon {after:.4g} at delta {privacy.delta:g} after {rounds} rounds, for "
            f"any two data sets that differ in one {self.unit} ({self.counted(release)})."
        )
        log(INFO, "%s", self.recorder.promised)
        if privacy.delta * release.population >= 1:
            self.recorder.warn(
                f"privacy.delta={privacy.delta:g} is not below one over the number of {self.unit}s "
                f"({release.population}): a mechanism that publishes all there is of one {self.unit} would pass."
            )

    def _epsilon(self, releases: Sequence[Release]) -> float:
        return epsilon(releases, self.multiplier, self.config.privacy.delta)

    def replies(self, accepted: Accepted) -> Accepted:
        self.recorder.current.train_loss = None  # clients keep theirs
        return [(task, dataclasses.replace(reply, examples=1)) for task, reply in accepted]
