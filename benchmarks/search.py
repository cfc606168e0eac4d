"""The step size of a method: a short search over a logarithmic grid, the same for every method, on training data only.
Where the rows for it come from is decided in rows.py.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cells import Cells, Outcome
from benchmarks.plan import Plan, Variant
from spry_app.config import RunConfig, Scalar
from spry_app.methods import get_method

Keys = Mapping[str, Scalar]
FACTOR = 3.0
"""Between neighbours of a grid."""
MOST_EXTENSIONS = 4
ALIKE = 1e-3
"""Part of a loss by which two of them cannot be told apart."""


@dataclass(frozen=True)
class Knob:
    """Which keys are step sizes for a kind of server and client step, and where their grids of four begin.

    like: a method with this server step, by whose head alone the head's step size is chosen. optimizer: the clients'.
    """

    adapter: str
    head: str
    adapter_from: float
    head_from: float
    like: str
    optimizer: str


_LOCAL = Knob("client.learning-rate", "client.head-learning-rate", 1e-3, 3e-3, "fedavg", "adam")
_PLAIN = Knob("client.learning-rate", "client.head-learning-rate", 0.1, 0.1, "fedavg", "sgd")
_GRADIENT = Knob("server.learning-rate", "server.head-learning-rate", 0.1, 0.1, "fedsgd", "adam")
_ADAPTIVE = Knob("server.learning-rate", "server.head-learning-rate", 3e-3, 1e-2, "fedyogi", "adam")
KNOBS = {
    ("average", "adam"): _LOCAL,
    ("average", "adamw"): _LOCAL,
    ("average", "sgd"): _PLAIN,
    **{(server, client): _GRADIENT for server in ("sgd", "momentum") for client in ("sgd", "adam", "adamw")},
}
"""Server's and clients' step -> their sizes. All others are adaptive: clients take small steps, the server large ones.
"""
Knobs = Mapping[tuple[str, str], Knob]
PER_STEP = Knob("server.learning-rate", "server.head-learning-rate", 3e-3, 3e-3, "spry-per-iteration", "sgd")
PER_STEP_KNOBS: Knobs = {**KNOBS, ("yogi", "sgd"): PER_STEP}
"""For a table in which clients that take plain steps talk to an adaptive server after each of them: it then takes many
steps, not a few large ones, with the head too.
"""
SMALL_STEP = 1e-2
"""client.learning-rate where the server's step is adaptive, and so does not depend on the size of the clients'."""


def knob_of(keys: Keys, knobs: Knobs = KNOBS) -> Knob:
    """Which step sizes a run has."""
    config = RunConfig.from_flower(keys)
    return knobs.get((get_method(config).server_optimizer, config.client.optimizer), _ADAPTIVE)


@dataclass
class Search:
    """One key of one cell; `tried` grows."""

    name: str
    keys: Keys
    key: str
    first: float
    tried: dict[float, Outcome] = field(default_factory=dict)

    def pending(self) -> list[float]:
        """The grid; then a value beyond its end while the best lies there, MOST_EXTENSIONS times at most."""
        if not self.tried:
            return [_value(self.first, place) for place in range(4)]
        extensions = len(self.tried) - 4
        if extensions >= MOST_EXTENSIONS or not math.isfinite(_loss(self.tried[self.best])):
            return []
        beyond = {min(self.tried): 1 / FACTOR, max(self.tried): FACTOR}
        return [_round(self.best * beyond[self.best])] if self.best in beyond else []

    @property
    def best(self) -> float:
        """The value with the lowest loss on the rows set apart, as a mean over the evaluations: one alone is at the
        mercy of whose turn it was in its round. Of losses that are ALIKE, the largest value's: steps that are too small
        to tell in a short run may tell in the whole one.
        """
        losses = {value: _loss(outcome) for value, outcome in self.tried.items()}
        enough = min(losses.values()) * (1 + ALIKE)
        return max(value for value, loss in losses.items() if loss <= enough)

    def record(self) -> dict[str, Any]:
        tried = [
            {"value": value, "error": outcome.error}
            if outcome.error
            else {"value": value, "loss": _mean(outcome, "loss"), "accuracy": _mean(outcome, "accuracy")}
            for value, outcome in sorted(self.tried.items())
        ]
        return {"for": self.name, "key": self.key, "chosen": self.best, "tried": tried}


def search(searches: Sequence[Search], cells: Cells, plan: Plan, what: str) -> None:
    """Fill `tried` of all of them, beside each other."""
    while todo := [(one, value) for one in searches for value in one.pending()]:
        found = cells.run([plan.cell({**one.keys, one.key: value}) for one, value in todo], what)
        for (one, value), outcome in zip(todo, found, strict=True):
            one.tried[value] = outcome


@dataclass
class Steps:
    """Finds step sizes and remembers every search."""

    cells: Cells
    plan: Plan
    knobs: Knobs = field(default_factory=lambda: KNOBS)
    done: list[Search] = field(default_factory=list)

    def find(self, variants: Mapping[str, Variant]) -> dict[str, dict[str, Scalar]]:
        """Name -> the variant's keys with step sizes. The head's are found once for each kind of server step, by
        training the head alone; then the adapter's for each variant. One whose searching runs all failed is left out.
        """
        wanted = {_told(one.searched): one.searched for one in variants.values()}
        knobs = {told: knob_of(self.plan.searching(keys), self.knobs) for told, keys in wanted.items()}
        heads = self._heads(set(knobs.values()))
        fixed: dict[str, dict[str, Scalar]] = {}
        adapters: dict[str, Search] = {}
        for told, keys in wanted.items():
            knob = knobs[told]
            fixed[told] = {"client.learning-rate": SMALL_STEP, **heads[knob]}
            if keys.get("adapter.kind") != "none":  # has no other step size than the head's
                adapters[told] = self._of(told, {**fixed[told], **keys}, knob.adapter, knob.adapter_from)
        self._search(list(adapters.values()), "Step sizes of the adapter")
        for told, search in adapters.items():
            fixed[told] = {} if search.tried[search.best].error else {**fixed[told], search.key: search.best}
        steps = {name: fixed[_told(one.searched)] for name, one in variants.items()}
        return {name: {**steps[name], **one.keys} for name, one in variants.items() if steps[name]}

    def _heads(self, knobs: set[Knob]) -> dict[Knob, dict[str, Scalar]]:
        """The clients' head first: where the server's step is adaptive, clients train their heads with it too."""
        local = self._head(_LOCAL, {})
        found = {_LOCAL: local}
        for knob in sorted(knobs - {_LOCAL}, key=lambda knob: (knob.like, knob.optimizer)):
            found[knob] = {**local, **self._head(knob, local)}
        return found

    def _head(self, knob: Knob, keys: Keys) -> dict[str, Scalar]:
        own = {"method": knob.like, "client.optimizer": knob.optimizer}
        alone = {**keys, "adapter.kind": "none", "adapter.targets": "", **own}
        told = f"{knob.like}, clients with {knob.optimizer}"
        one = self._of(f"head, {told}", alone, knob.head, knob.head_from)
        self._search([one], f"Step size of the head ({told})")
        return {knob.head: one.best}

    def _of(self, name: str, keys: Keys, key: str, first: float) -> Search:
        return Search(name, self.plan.searching(keys), key, first)

    def _search(self, searches: list[Search], what: str) -> None:
        search(searches, self.cells, self.plan, what)
        self.done += searches


def _told(keys: Keys) -> str:
    """The method, and what else sets it apart."""
    return ", ".join(str(value) if key == "method" else f"{key} {value}" for key, value in keys.items())


def _loss(outcome: Outcome) -> float:
    return math.inf if outcome.error else _mean(outcome, "loss")


def _mean(outcome: Outcome, quantity: str) -> float:
    """Over the evaluations after training has begun."""
    return statistics.fmean(line[quantity] for line in outcome.curve[1:] if line[quantity] is not None)


def _value(first: float, place: int) -> float:
    return _round(first * FACTOR**place)


def _round(value: float) -> float:
    return float(f"{value:.3g}")
