"""Who trains which units. Pure functions of the units, the number of clients and the round."""

from collections.abc import Sequence


def every_unit(units: Sequence[str], clients: int, round_: int) -> list[list[str]]:
    """Every client trains everything."""
    return [list(units) for _ in range(clients)]


def cyclic_split(units: Sequence[str], clients: int, round_: int) -> list[list[str]]:
    """Deal the units out like cards, starting one client further each round (SPRY, arXiv:2405.15551, Algorithm 1).

    With fewer units than clients the dealing goes round again, so several clients hold the same unit. Every unit is
    held by a client; hands differ in size by one at most, and so do the numbers of holders of the units.
    """
    hands: list[list[str]] = [[] for _ in range(clients)]
    if units:
        for turn in range(max(len(units), clients)):
            hands[(turn + round_) % clients].append(units[turn % len(units)])
    return hands
