"""Who takes part in a round, with which units and how many directions. What they are sent is the strategy's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import Method, Pace, Share
from spry_app.methods.global_state import GlobalState
from spry_app.methods.noise import fewest_directions
from spry_app.server.fleet import Fleet
from spry_app.server.noise import hands_of

Assign = Callable[[Sequence[float], int, Sequence[tuple[str, ...]], Sequence[Pace]], Sequence[Sequence[str]]]
"""(memory in MiB of each client, round, gradients that each can take, how fast each is) -> their units."""


@dataclass(frozen=True)
class Crew:
    """The clients of a round: their nodes, and of each the share of the work and the number of directions a batch."""

    nodes: list[int]
    shares: list[Share]
    directions: list[int]


def crew(
    config: RunConfig,
    method: Method,
    state: GlobalState,
    fleet: Fleet,
    nodes: list[int],
    assign: Assign,
    round_: int,
    order: Sequence[int] | None = None,
) -> Crew:
    """Clients drawn from `nodes`, those that are connected, or the first so many of them in `order`.

    With `noise.target-cosine` each takes no more directions than its units need; where `client.directions` is not
    enough for all, more clients are drawn, an eighth at a time, until it is or there are no more.
    """
    least = config.server.min_train_nodes
    while True:
        clients = fleet.sample(nodes, config.server.fraction_train, least, (config.seed, round_), order)
        # A promise of privacy would have to count what tasks depend on.
        paces = [] if config.privacy.mode else fleet.paces(clients)
        hands = assign(fleet.memory_mib(clients), round_, fleet.gradients(clients), paces)
        shares = [Share.of(hand) for hand in hands]
        if kind := fleet.gradient(nodes):
            shares = [Share(share, kind, share.directions, share.steps) for share in shares]
        _check(config, shares)
        directions, enough = _directions(config, method, state, shares)
        if enough or len(clients) == len(nodes):
            return Crew(clients, shares, directions)
        least = len(clients) + max(1, len(clients) // 8)


def _check(config: RunConfig, shares: Sequence[Share]) -> None:
    if config.privacy.unit == "example" and any(share.gradient for share in shares):
        raise SpryError(
            "privacy.unit='example' counts what a row says by one kind of gradient, and clients were given others: set "
            'assign to "every-unit", "cyclic" or "by-depth", or privacy.unit="client".'
        )


def _directions(
    config: RunConfig, method: Method, state: GlobalState, shares: Sequence[Share]
) -> tuple[list[int], bool]:
    """Of each client, and whether the target is reached."""
    most, target = config.client.directions, config.noise.target_cosine
    hands = hands_of(state, method, ((share, most, 1, share.gradient) for share in shares)) if target else []
    needed, reached = fewest_directions(hands, method.directions, target, most)
    found = [max((needed[unit] for unit in share if unit in needed), default=most) for share in shares]
    return [min(count, share.directions or most) for count, share in zip(found, shares, strict=True)], reached
