"""From the accepted replies of a round to one mean change: what each asks for, what it weighs, how noisy the mean is.
Which replies are fit is decided before (checks.py), what the server does with the mean after (methods.global_state).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from spry_app.autodiff.directions import Tensors
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import Method
from spry_app.methods.global_state import GlobalState, merged
from spry_app.methods.noise import Hand, Weigh, relative_noise
from spry_app.methods.precision import Spread, relative_variance, spread
from spry_app.protocol import Task, TrainReply
from spry_app.server.guard import Accepted, Changes, Guard
from spry_app.server.noise import hands_of, noise_of
from spry_app.slope_log import Entry

Units = Mapping[str, Sequence[str]]


class ByExamples:
    """Each client weighs as many examples as it trained on, whatever its gradient."""

    def __init__(self, config: RunConfig, method: Method, units: Units) -> None:
        self._batch, self._method, self._units = config.client.batch_size, method, units

    @property
    def kept(self) -> Tensors:
        """What the next round's weights depend on."""
        return {}

    def load(self, kept: Tensors) -> None:
        """Become what another one was. Raises SpryError where it is none of this kind."""
        if kept:
            raise SpryError(
                "The run cannot be resumed: its checkpoint has weights by precision, which it does not use."
            )

    def weigh(self, hands: Sequence[Hand]) -> Weigh | None:
        """Weight and relative variance of each client's estimate of a unit; None for examples, and one variance.

        hands: of each client, what it perturbs, with the examples it trained on.
        """
        return None

    def weighted(self, hands: Sequence[Hand]) -> list[Hand]:
        """With their weights in the place of examples."""
        return list(hands)

    def learn(self, hands: Sequence[Hand], changes: Changes) -> None:
        """From the changes of a round, for the weights of later ones."""


class ByPrecision(ByExamples):
    """Each client weighs what makes the mean's variance least (methods.precision).

    The relative variance of single examples' gradients is that of earlier rounds: weights that followed from the
    noise of the replies they weigh would bias the mean. One number for all units that anybody perturbs; the others,
    an exact head, weigh examples, as do all clients with the same gradient and number of directions.
    """

    def __init__(self, config: RunConfig, method: Method, units: Units) -> None:
        super().__init__(config, method, units)
        self._spread = Spread()

    @property
    def kept(self) -> Tensors:
        return {"spread": torch.tensor([self._spread.noise, self._spread.signal], dtype=torch.float64)}

    def load(self, kept: Tensors) -> None:
        found = kept.get("spread")
        if found is None or found.shape != (2,) or found.dtype != torch.float64:
            raise SpryError("The run cannot be resumed: its checkpoint has no weights by precision.")
        self._spread = Spread(*found.tolist())

    def weigh(self, hands: Sequence[Hand]) -> Weigh:
        def variance(unit: str, client: int) -> float:
            noise = self._noise(hands[client]) if unit in hands[client].units else 0.0
            return relative_variance(noise, self._batch, self._spread.single)

        @functools.cache
        def bounds(unit: str) -> tuple[float, float]:
            found = [variance(unit, client) for client, hand in enumerate(hands) if unit in hand.units]
            return min(found, default=0.0), max(found, default=0.0)

        def weigh(unit: str, client: int) -> tuple[float, float]:
            (least, most), examples = bounds(unit), hands[client].examples
            if least == most:
                return examples, 1.0
            own = variance(unit, client)
            return examples * (least / own), own / examples

        return weigh

    def weighted(self, hands: Sequence[Hand]) -> list[Hand]:
        variances = [relative_variance(self._noise(hand), self._batch, self._spread.single) for hand in hands]
        least = min(variances, default=1.0)
        return [
            dataclasses.replace(hand, examples=hand.examples * (least / own))
            for hand, own in zip(hands, variances, strict=True)
        ]

    def _noise(self, hand: Hand) -> float:
        return relative_noise(hand.dimensions, hand.directions, self._method.directions)

    def learn(self, hands: Sequence[Hand], changes: Changes) -> None:
        found = []
        for unit, names in self._units.items():
            holders = [i for i, hand in enumerate(hands) if unit in hand.units]
            if not any(hands[i].dimensions for i in holders):
                continue
            kinds = {(self._noise(hands[i]), hands[i].units) for i in holders}
            for noise, held in sorted(kinds):  # the most precise of which there are two or more
                alike = [i for i in holders if (self._noise(hands[i]), hands[i].units) == (noise, held)]
                if len(alike) > 1 and not (noise and self._method.directions == "orthogonal"):
                    flat = [torch.cat([changes[i][0][name].flatten() for name in names]) for i in alike]
                    found.append(spread(flat, [hands[i].examples for i in alike], noise, self._batch))
                    break
        self._spread = self._spread.after(found)


WEIGHTINGS: dict[str, Callable[[RunConfig, Method, Units], ByExamples]] = {
    "examples": ByExamples,
    "precision": ByPrecision,
}
"""server.weighting -> what does it."""


class Combiner:
    """Makes one mean of a round's accepted replies, as method, guard and weighting say."""

    def __init__(self, config: RunConfig, method: Method, state: GlobalState, units: Units, guard: Guard) -> None:
        self._method, self._state, self._units, self._guard = method, state, units, guard
        self._discount = config.server.late_discount
        self.weighting = WEIGHTINGS[config.server.weighting](config, method, units)

    def as_used(self, accepted: Accepted) -> Accepted:
        """The replies as they enter the mean: `in_full`, and those of earlier rounds discounted.

        A late client's change is that from the tensors which it started from, and is scaled down by
        `server.late-discount` for each round that it is late. In the mean it counts like any other, so that the step
        gets smaller by what it lacks (FedBuff, arXiv:2106.06639, whose discount is a root of the rounds; a factor a
        round is ours).
        """
        now, discount = self._guard.recorder.current.round, self._discount
        return [
            (task, self._scaled(task, reply, discount ** (now - task.round)) if task.round < now else reply)
            for task, reply in self.in_full(accepted)
        ]

    def _scaled(self, task: Task, reply: TrainReply, factor: float) -> TrainReply:
        change = {name: factor * value for name, value in self.change(task, reply).items()}
        if self._method.reply != "gradient":
            change = {name: task.tensors[name] - value for name, value in change.items()}
        return dataclasses.replace(reply, tensors=change)

    def in_full(self, accepted: Accepted) -> Accepted:
        """The replies, of which partial ones weigh as many examples as all of their steps would have had.

        A change made by part of the steps is that of all of them but for the others, which count as none. So it weighs
        the examples of all, n / f for n examples in the part f of the steps, and the mean

            sum n/f change / sum n/f = F sum n (change / f) / sum n,    F = sum n / sum n/f

        is FedNova's (arXiv:2007.07481): changes by step, weighted by the examples that were used, times an effective
        number of steps. Every example counts the same. By n itself a client would count with the square of its steps;
        by rows held, whatever was used of them, noise of the few steps would be blown up. A gradient is a mean already.
        """
        return [(task, self._whole(reply) if reply.partial else reply) for task, reply in accepted]

    def _whole(self, reply: TrainReply) -> TrainReply:
        if self._method.reply == "gradient":
            return reply
        slopes = reply.slopes
        if slopes and self._method.seeds == "shared":  # their mean is taken step by step
            slopes += ((0.0,) * len(slopes[0]),) * (reply.steps_asked - reply.steps)
        examples = max(1, round(reply.examples * reply.steps_asked / reply.steps))
        return dataclasses.replace(reply, examples=examples, slopes=slopes)

    def change(self, task: Task, reply: TrainReply) -> Tensors:
        """What one client asks for by tensors: its gradient, or (value sent - value after its training)."""
        if self._method.reply == "gradient":
            return reply.tensors
        return {name: task.tensors[name] - value for name, value in reply.tensors.items()}

    def entry(self, accepted: Accepted) -> Entry:
        """What was measured in the round of these tasks; nothing where no scalars came."""
        measured = [
            self._state.measured(task.number, task.sharing, task.units, reply.examples, reply.slopes)
            for task, reply in accepted
            if reply.slopes
        ]
        (task, _), *_ = accepted
        return self._guard.released(Entry(task.round, merged(measured)))

    def hands(self, accepted: Accepted) -> list[Hand]:
        """What these clients perturbed, as their log tells it where there is one, with what they weigh."""
        if self._method.reply == "slopes":
            return self._state.hands(self.entry(accepted))
        return self.weighting.weighted(self._as_asked(accepted))

    def _as_asked(self, accepted: Accepted) -> list[Hand]:
        clients = ((task.units, task.directions, reply.examples, task.gradient) for task, reply in accepted)
        return hands_of(self._state, self._method, clients)

    def mean(self, accepted: Accepted) -> Tensors:
        """Per tensor, the mean of the clients' changes over those that trained it. How much of it is noise is recorded,
        unless the guard, which comes after, takes that back.
        """
        as_they_are = self._changes(accepted)
        rebuilt = list(self._state.changes(self.entry(accepted)))
        hands = self._as_asked(accepted) if self._method.reply != "slopes" else []
        weigh = self.weighting.weigh(hands) if hands else None
        exact = [client for client, hand in enumerate(hands) if not hand.dimensions]
        self._guard.recorder.current.noise = noise_of(
            self._state,
            self._method,
            self._units,
            [*as_they_are, *rebuilt],
            self.hands(accepted),
            weigh,
            exact,
        )
        if weigh:
            as_they_are = list(self._by_unit(accepted, as_they_are, weigh))
        return self._guard.mean(accepted, as_they_are, rebuilt)

    def learn(self, accepted: Accepted) -> None:
        """What the weights of later rounds follow from, once the round has its mean."""
        if self._method.reply != "slopes":
            now = self._guard.recorder.current.round
            whole = [(task, reply) for task, reply in accepted if not reply.partial and task.round == now]
            self.weighting.learn(self._as_asked(whole), self._changes(whole))

    def _changes(self, accepted: Accepted) -> list[tuple[Tensors, float]]:
        return [(self.change(task, reply), reply.examples) for task, reply in accepted]

    def _by_unit(self, accepted: Accepted, changes: Changes, weigh: Weigh) -> Iterator[tuple[Tensors, float]]:
        for client, ((task, _), (change, _)) in enumerate(zip(accepted, changes, strict=True)):
            for unit in task.units:
                yield {name: change[name] for name in self._units[unit]}, weigh(unit, client)[0]
