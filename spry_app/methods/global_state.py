"""What a run has learned so far, and the only way it changes. The server holds it; where a method sends its slope log,
every client rebuilds the same bits from what the others measured.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from spry_app.autodiff.directions import Seed, Tensors
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods.method import Method
from spry_app.methods.noise import Hand, expected_cosines
from spry_app.methods.replay import HEAD, exact_names, local_optimizer, replay
from spry_app.methods.schedule import client_scale, server_scale
from spry_app.optimizers import SERVER_OPTIMIZERS, NamedOptimizer, Rule
from spry_app.slope_log import Entry, Measured


class GlobalState:
    """The trainable tensors (fp32, CPU) and the server's optimizer after round number `round`.

    tensors: of round 0. units: unit -> names of its tensors. exact: tensors that no scalar stands for, in a method
    that uses slopes.
    """

    def __init__(self, tensors: Tensors, units: Mapping[str, Sequence[str]], method: Method, config: RunConfig) -> None:
        server = config.server
        rule = Rule(method.server_optimizer, server.learning_rate, 0.0, server.beta1, server.beta2, server.tau)
        head_rate = server.head_learning_rate or server.learning_rate
        rates = {name: head_rate for name in units.get(HEAD, ())}
        self.optimizer = NamedOptimizer(tensors, SERVER_OPTIMIZERS, rule, rates)
        self.exact = exact_names(units, method, config.head_gradient)
        self.round = 0
        self._units, self._method, self._config = units, method, config
        self._numbers = tuple(units)

    @property
    def tensors(self) -> Tensors:
        """Copies of the current values."""
        return {name: value.clone() for name, value in self.optimizer.tensors.items()}

    def step(self, round_: int, pseudo_gradient: Tensors, hands: Sequence[Hand] = ()) -> None:
        """The server's step; tensors that it leaves out, and their moments, stay as they are.

        hands: what the clients perturbed. With `noise.scale-step` each unit goes as far as its mean is to be trusted.
        """
        cosines = expected_cosines(hands, self._method.directions) if self._config.noise.scale_step else {}
        parts = {name: part for unit, part in cosines.items() for name in self._units[unit] if name not in self.exact}
        self.optimizer.step(pseudo_gradient, parts, server_scale(self._config, self._method, round_))
        self.round = round_

    def perturbed(self, units: Iterable[str], gradient: str = "") -> dict[str, int]:
        """The tensors that slopes of these units are for, and how many numbers each has; none for a `gradient` that is
        exact (as Method.taking).
        """
        method, now = self._method.taking(gradient), self.optimizer.tensors
        if method.gradient.slopes is None:
            return {}
        exact = exact_names(self._units, method, self._config.head_gradient)
        return {name: now[name].numel() for unit in units for name in self._units[unit] if name not in exact}

    def hand(self, units: Iterable[str], directions: int, examples: int = 1, gradient: str = "") -> Hand:
        """What a client perturbs that holds these units."""
        exact = exact_names(self._units, self._method.taking(gradient), self._config.head_gradient)
        held = tuple(unit for unit in units if not exact.issuperset(self._units[unit]))
        return Hand(held, sum(self.perturbed(held, gradient).values()), directions, examples)

    def hands(self, entry: Entry) -> list[Hand]:
        """What the clients of a round perturbed, by its log. With two blocks (FedSPZO) K is that of the lower half."""
        return [
            self.hand(
                [self._numbers[number] for number in measured.units],
                len(measured.slopes[0]) // self._method.gradient.slopes_per_direction,
                measured.examples,
            )
            for measured in entry.measured
        ]

    def measured(
        self, number: int, sharing: int, units: Iterable[str], examples: int, slopes: Sequence[Sequence[float]]
    ) -> Measured:
        """As the log has it: units by number, and only those with tensors that the scalars stand for.

        number, sharing: of the seed.
        """
        numbers = (self._numbers.index(unit) for unit in units if not self.exact.issuperset(self._units[unit]))
        return Measured(number, tuple(numbers), examples, tuple(map(tuple, slopes)), sharing)

    def changes(self, entry: Entry) -> Iterator[tuple[Tensors, int]]:
        """How each client changed the tensors that its scalars stand for, and its examples."""
        for measured in entry.measured:
            before, after = self.trained(measured, entry.round)
            yield {name: before[name] - after[name] for name in before}, measured.examples

    def follow(self, entry: Entry) -> None:
        """Take the server's step of a round from its log. Raises SpryError where that is of another model or method."""
        for measured in entry.measured:
            self._check(measured, entry.round)
        self.step(entry.round, mean_change(self.changes(entry)), self.hands(entry))

    def _check(self, measured: Measured, round_: int) -> None:
        per, width = self._method.gradient.slopes_per_direction, len(measured.slopes[0]) if measured.slopes else 0
        known = max(measured.units, default=0) < len(self._numbers)
        if not (known and measured.examples and width and width % per == 0):
            raise SpryError(
                f"Round {round_} of the slope log has {width} slopes a step, {measured.examples} examples, units "
                f"{measured.units}; this model has {len(self._numbers)} units, and a direction {per} slopes."
            )

    def trained(self, measured: Measured, round_: int) -> tuple[Tensors, Tensors]:
        """The tensors that some scalars stand for, before and after the local steps that they describe."""
        now = self.optimizer.tensors
        names = (name for number in measured.units for name in self._units[self._numbers[number]])
        before = {name: now[name] for name in names if name not in self.exact}
        seed = Seed(self._config.seed, round_, measured.client, step=0, sharing=measured.sharing)
        scale = client_scale(self._config, self._method, round_)
        optimizer = local_optimizer(before, self._units, self._config.client, scale)
        return before, replay(optimizer, measured.slopes, seed, self._method.gradient)

    def load(self, round_: int, tensors: Tensors, moments: Tensors) -> None:
        """Become what another one was after `round_`. Raises SpryError where that was of another model."""
        self.optimizer.load(tensors, moments)
        self.round = round_

    def digest(self) -> str:
        """Of all tensors, by name and to the bit."""
        return digest(self.optimizer.tensors)


def mean_change(changes: Iterable[tuple[Tensors, float]]) -> Tensors:
    """Per tensor, the mean over those who have it, weighted by their examples or what is in their place, in the order
    given.
    """
    total: Tensors = {}
    weight: dict[str, float] = {}
    for tensors, own in changes:
        for name, value in tensors.items():
            change = value * own
            total[name] = total[name] + change if name in total else change
            weight[name] = weight.get(name, 0) + own
    return {name: value / weight[name] for name, value in total.items()}


def merged(replies: Sequence[Measured]) -> tuple[Measured, ...]:
    """One for all clients that measured the same units along the same directions: their slopes are averaged, weighted
    by examples, as steps that are linear in the slopes allow (DeComFL, arXiv:2405.15861).
    """
    groups: dict[tuple[int, tuple[int, ...]], list[Measured]] = {}
    for reply in replies:
        groups.setdefault((reply.client, reply.units), []).append(reply)
    return tuple(_mean(group) for group in groups.values())


def _mean(group: Sequence[Measured]) -> Measured:
    first, *others = group
    if not others:
        return first
    examples = sum(reply.examples for reply in group)
    weighted = [torch.tensor(reply.slopes, dtype=torch.float64) * reply.examples for reply in group]
    mean = torch.stack(weighted).sum(0) / examples
    return Measured(first.client, first.units, examples, tuple(map(tuple, mean.tolist())), first.sharing)


def digest(tensors: Tensors) -> str:
    """Hash of names and bits, the same in any order."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        found.update(f"{name} {tuple(tensors[name].shape)} ".encode())
        found.update(tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()
