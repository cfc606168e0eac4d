"""What is compared: ways to a gradient and hands of units, as run-config keys over those of a run. Nothing runs."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from spry_app.config import RunConfig, Scalar
from spry_app.errors import SpryError
from spry_app.methods import ASSIGNMENTS, Layout, Method, get_method
from spry_app.models import AdaptedModel
from spry_app.planner.blank import start_of
from spry_app.server.dealing import deal_out

AS_SET = "as set"
GRADIENTS: dict[str, tuple[str, bool]] = {
    "backprop": ("backprop", False),
    "checkpointed backprop": ("checkpointed-backprop", False),
    "bisected backprop": ("bisected-backprop", False),
    "forward mode": ("forward-mode", False),
    "forward mode, K at once": ("forward-mode", True),
    "central difference": ("central-difference", False),
    "one-sided difference": ("one-sided-difference", False),
}
"""What a row is called -> `gradient`, and whether all directions share a pass."""
HANDS: dict[str, tuple[str, bool]] = {
    "all": ("every-unit", False),
    "split": ("cyclic", False),
    "topmost": ("by-depth", True),
}
"""What the units of a row are called -> `assign`, and whether they are the highest hand of the round; else the lowest,
which costs the most: on a fleet of equals, all hold it in turns.
"""


@dataclass(frozen=True, eq=False)
class Way:
    """A run, as far as one step of one of its clients goes.

    keys: what sets it apart from the run as it is set. method: on the model at hand. units: of the client.
    """

    name: str
    hand: str
    keys: dict[str, Scalar]
    config: RunConfig
    method: Method
    units: tuple[str, ...]


@dataclass(frozen=True)
class _Runs:
    """A run as it is set, on a model and so many clients, and what it is with other keys."""

    config: RunConfig
    adapted: AdaptedModel
    clients: int

    def way(self, name: str, hand: str, keys: dict[str, Scalar], highest: bool = False) -> Way:
        """Raises SpryError where the keys do not go together."""
        whole = self.config.flat() | keys
        config = RunConfig.from_flower(whole, whole.keys()) if keys else self.config
        method = get_method(config).on(Layout(self.adapted.depths(), len(self.adapted.blocks)), config.client)
        hands = deal_out(config, method, self.adapted.units, start_of(self.adapted), [0.0] * self.clients, 1)
        return Way(name, hand, keys, config, method, tuple(_extreme(hands, self.adapted, highest)))

    def allowed(self, name: str, hand: str, keys: dict[str, Scalar], highest: bool) -> Way | None:
        """With the run's own method, or as weights where that sends scalars alone; None where neither is to be had."""
        weights: dict[str, Scalar] = {
            "preset": self.config.preset,  # another method would not have it by itself
            "method": "fedavg",
            "server.optimizer": get_method(self.config).server_optimizer,
            "send": "",
            "directions": "",
            "client.local-steps": max(1, self.config.client.local_steps),
        }
        for more in ({}, weights):
            with suppress(SpryError):
                return self.way(name, hand, keys | more, highest)
        return None


def ways(
    config: RunConfig, adapted: AdaptedModel, clients: int, hands: Collection[str] = tuple(HANDS)
) -> Iterator[Way]:
    """The run as it is set, and of these HANDS all others that its keys allow. Raises SpryError for one that is not to
    be had as it is set.
    """
    own, runs = get_method(config), _Runs(config, adapted, clients)
    names = [name for name, (assign, _) in HANDS.items() if ASSIGNMENTS[assign] is own.assign]
    yield runs.way(AS_SET, names[0] if names else "own", {})
    for hand, (assign, highest) in ((hand, HANDS[hand]) for hand in HANDS if hand in hands):
        for name, (gradient, together) in GRADIENTS.items():
            keys: dict[str, Scalar] = {"gradient": gradient, "assign": assign}
            at_once = config.client.directions if together else 1
            if gradient == "forward-mode":
                keys["client.directions-at-once"] = at_once
                if together and at_once == 1:
                    continue
            found = runs.allowed(name, hand, keys, highest)
            if found is not None:
                yield found


def kinds(config: RunConfig, adapted: AdaptedModel, clients: int, names: Iterable[str]) -> Iterator[Way]:
    """The run as it is set, with each of these gradients (autodiff.gradients) for all clients; without those that its
    method cannot take.
    """
    own = _Runs(config, adapted, clients).way(AS_SET, "own", {})
    for name in names:
        with suppress(SpryError):
            yield dataclasses.replace(own, name=name, keys={"gradient": name}, method=own.method.taking(name))


def _extreme(hands: Sequence[Sequence[str]], adapted: AdaptedModel, highest: bool) -> Sequence[str]:
    def depth(hand: Sequence[str]) -> tuple[int, int]:
        names = [name for unit in hand for name in adapted.units[unit]]
        return adapted.depth(names), -sum(adapted.model.get_parameter(name).numel() for name in names)

    return (max if highest else min)(hands, key=depth)
