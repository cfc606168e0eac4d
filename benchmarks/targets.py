"""What was aimed at, and what a run reached of it. Nothing is measured here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.measure import Memory, ratio
from benchmarks.variants import BACKPROP, CHECKPOINTED, INFERENCE, OURS, Settings, together


@dataclass(frozen=True)
class Slicing:
    """Figures of a step whose batch is cut in one way, by variant: seconds in each round, or why none, memory."""

    seconds: Mapping[str, list[float]]
    errors: Mapping[str, str]
    memory: Mapping[str, Memory]

    def time(self, name: str, to: str) -> float:
        """Median ratio of two variants. KeyError where one has no figure."""
        return ratio(self.seconds[name], self.seconds[to])

    def activations(self, name: str) -> float:
        """MiB. KeyError where there is no figure."""
        mib = self.memory[name].activations
        if mib is None:
            raise KeyError(name)
        return mib


Figure = Callable[[Settings, Slicing, Slicing], float]
"""(settings, batch as a whole, micro-batches of 1) -> what was reached; KeyError where it was not measured."""


@dataclass(frozen=True)
class Target:
    """unit is printed behind the numbers. applies: which settings it is about."""

    name: str
    bound: float
    figure: Figure
    applies: Callable[[Settings], bool]
    at_least: bool = False
    unit: str = ""

    def verdict(self, settings: Settings, whole: Slicing, sliced: Slicing) -> "Verdict":
        """Reached is None where something that it needs was not measured."""
        try:
            reached: float | None = self.figure(settings, whole, sliced)
        except KeyError:
            reached = None
        met = reached is not None and (reached >= self.bound if self.at_least else reached <= self.bound)
        return Verdict(self.name, f"{'>=' if self.at_least else '<='} {self.bound:g}{self.unit}", reached, met)


@dataclass(frozen=True)
class Verdict:
    name: str
    target: str
    reached: float | None
    met: bool


def _further(settings: Settings, whole: Slicing, sliced: Slicing) -> float:
    """Time of the K - 1 directions that share the first one's pass, each in forward passes."""
    k = settings.directions
    return (whole.time(together(k), INFERENCE) - whole.time(OURS, INFERENCE)) / (k - 1)


def _all(settings: Settings) -> bool:
    return settings.units == "all"


def _is_the_7b(settings: Settings) -> bool:
    shape = (settings.model, settings.bits, settings.layers, settings.batch, settings.length)
    return shape == ("llama2-7b", 4, 0, 8, 512)


TARGETS = (
    Target("time, all units, ratio to backprop", 0.95, lambda s, w, m: w.time(OURS, BACKPROP), _all),
    Target("time, all units, ratio to inference", 2.0, lambda s, w, m: w.time(OURS, INFERENCE), _all),
    Target("time of a further direction, in forward passes", 1.15, _further, lambda s: s.directions > 1),
    Target(
        "time, top unit, ratio to inference", 1.2, lambda s, w, m: w.time(OURS, INFERENCE), lambda s: s.units == "top"
    ),
    Target(
        "activations, whole batch, ratio to inference",
        2.0,
        lambda s, w, m: w.activations(OURS) / w.activations(INFERENCE),
        _all,
    ),
    Target(
        "activations, micro-batch 1, ratio to inference of the whole batch",
        0.35,
        lambda s, w, m: m.activations(OURS) / w.activations(INFERENCE),
        _all,
    ),
    Target(
        "activations, micro-batch 1, checkpointed backprop's over ours",
        1.8,
        lambda s, w, m: m.activations(CHECKPOINTED) / m.activations(OURS),
        _all,
        at_least=True,
    ),
    Target(
        "weights and activations, micro-batch 1",
        4.0,
        lambda s, w, m: (m.memory[OURS].weights + m.activations(OURS)) * 2**20 / 1e9,
        _is_the_7b,
        unit=" GB",
    ),
)


def verdicts(settings: Settings, whole: Slicing, sliced: Slicing) -> list[Verdict]:
    """Of the targets that are about these settings."""
    return [target.verdict(settings, whole, sliced) for target in TARGETS if target.applies(settings)]
