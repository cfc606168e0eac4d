"""Who trains what: coverage, balance, rotation and cost, for any numbers of units and clients."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spry_app.methods import ASSIGNMENTS
from spry_app.methods.assignment import (
    Assign,
    Deal,
    cyclic_split,
    depth_split,
    every_unit,
    forward_passes,
)

counts = st.integers(1, 40)
rounds = st.integers(0, 1000)


def deal_of(units: Sequence[str] | int, clients: int, round_: int = 0) -> Deal:
    """A block for each unit, units of one value, clients that have stated no memory."""
    names = tuple(f"unit{i}" for i in range(units)) if isinstance(units, int) else tuple(units)
    many = len(names)
    return Deal(
        units=names,
        depths=tuple(range(many)),
        sizes=(1,) * many,
        blocks=many,
        memory_mib=(0.0,) * clients,
        round=round_,
    )


@st.composite
def deals(draw: st.DrawFn) -> Deal:
    """Any model: some units a block or none, units of any size, maybe some above the blocks; clients of any memory."""
    blocks = draw(st.integers(1, 12))
    depths = sorted(draw(st.lists(st.integers(0, blocks), min_size=1, max_size=30)))
    return Deal(
        units=tuple(f"unit{i}" for i in range(len(depths))),
        depths=tuple(depths),
        sizes=tuple(draw(st.lists(st.integers(1, 5000), min_size=len(depths), max_size=len(depths)))),
        blocks=blocks,
        memory_mib=tuple(draw(st.lists(st.sampled_from([0.0, 8.0, 64.0]), min_size=1, max_size=20))),
        round=draw(rounds),
    )


def costs(deal: Deal, split: Assign) -> list[float]:
    return [forward_passes(hand, deal, directions=4) for hand in split(deal)]


@pytest.mark.parametrize("assign", ASSIGNMENTS.values(), ids=ASSIGNMENTS)
@given(deal=deals())
def test_every_unit_is_trained_and_every_client_has_work(assign: Assign, deal: Deal) -> None:
    hands = assign(deal)
    assert len(hands) == deal.clients
    assert {unit for hand in hands for unit in hand} == set(deal.units)
    assert all(hands)
    assert all(len(set(hand)) == len(hand) for hand in hands)


@pytest.mark.parametrize("split", [cyclic_split, depth_split])
@given(deal=deals())
def test_numbers_of_holders_differ_by_one_at_most(split: Assign, deal: Deal) -> None:
    held = Counter(unit for hand in split(deal) for unit in hand)
    assert max(held.values()) - min(held.values()) <= 1


@pytest.mark.parametrize("split", [cyclic_split, depth_split])
@given(units=counts, clients=counts, start=rounds)
def test_over_as_many_rounds_as_equal_clients_each_meets_every_unit(
    split: Assign, units: int, clients: int, start: int
) -> None:
    met: list[set[str]] = [set() for _ in range(clients)]
    for round_ in range(start, start + clients):
        for client, hand in enumerate(split(deal_of(units, clients, round_))):
            met[client].update(hand)
    assert all(units_met == set(deal_of(units, clients).units) for units_met in met)


@given(units=counts, clients=counts, round_=rounds)
def test_cards_differ_in_number_by_one_at_most(units: int, clients: int, round_: int) -> None:
    hands = cyclic_split(deal_of(units, clients, round_))
    assert max(map(len, hands)) - min(map(len, hands)) <= 1


def test_three_units_over_two_clients_by_hand() -> None:
    assert cyclic_split(deal_of("abc", 2, 0)) == [["a", "c"], ["b"]]
    assert cyclic_split(deal_of("abc", 2, 1)) == [["b"], ["a", "c"]]
    assert depth_split(deal_of("abc", 2, 0)) == [["a", "b"], ["c"]]
    assert depth_split(deal_of("abc", 2, 1)) == [["c"], ["a", "b"]]


def test_two_units_over_three_clients_by_hand() -> None:
    assert cyclic_split(deal_of("ab", 3, 0)) == [["a"], ["b"], ["a"]]
    assert cyclic_split(deal_of("ab", 3, 1)) == [["a"], ["a"], ["b"]]
    assert depth_split(deal_of("ab", 3, 0)) == [["a"], ["a"], ["b"]]
    assert depth_split(deal_of("ab", 3, 1)) == [["a"], ["b"], ["a"]]


@pytest.mark.parametrize("split", [cyclic_split, depth_split])
def test_nothing_to_deal_leaves_empty_hands(split: Assign) -> None:
    assert split(deal_of([], 2, 5)) == [[], []]


@given(deal=deals())
def test_without_a_split_everyone_trains_everything(deal: Deal) -> None:
    assert every_unit(deal) == [list(deal.units)] * deal.clients


@given(deal=deals())
def test_by_depth_hands_are_bands_and_less_memory_gets_a_higher_one(deal: Deal) -> None:
    """0.0 states no limit, which is more than any number."""
    hands = [[deal.units.index(unit) for unit in hand] for hand in depth_split(deal)]
    assert all(hand == list(range(hand[0], hand[0] + len(hand))) for hand in hands)
    strength = [memory or math.inf for memory in deal.memory_mib]
    paid = costs(deal, depth_split)
    for a, b in itertools.permutations(range(deal.clients), 2):
        if strength[a] < strength[b]:
            assert hands[a][0] >= hands[b][0]
            assert paid[a] <= paid[b]


@given(deal=deals())
def test_over_as_many_rounds_as_there_are_equal_clients_they_pay_alike(deal: Deal) -> None:
    for memory, equals in Counter(deal.memory_mib).items():
        turns = range(deal.round, deal.round + equals)
        paid = [costs(dataclasses.replace(deal, round=round_), depth_split) for round_ in turns]
        totals = [
            sum(column) for column, m in zip(zip(*paid, strict=True), deal.memory_mib, strict=True) if m == memory
        ]
        assert totals == pytest.approx([totals[0]] * equals)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=9), clients=st.integers(1, 9))
def test_bands_are_as_even_as_any_cut_could_make_them(sizes: list[int], clients: int) -> None:
    """Least sum of squared sizes, against every way to cut the row."""
    deal = dataclasses.replace(deal_of(len(sizes), clients), sizes=tuple(sizes))
    count = min(len(sizes), clients)

    def unevenness(cuts: Sequence[int]) -> int:
        return sum(sum(sizes[start:end]) ** 2 for start, end in itertools.pairwise([0, *cuts, len(sizes)]))

    best = min(map(unevenness, itertools.combinations(range(1, len(sizes)), count - 1)))
    starts = sorted({deal.units.index(hand[0]) for hand in depth_split(deal)})
    assert unevenness(starts[1:]) == best


@given(deal=deals())
def test_by_depth_never_costs_more_in_all_than_dealing_cards(deal: Deal) -> None:
    assert sum(costs(deal, depth_split)) <= sum(costs(deal, cyclic_split)) + 1e-9


def test_the_cost_of_twelve_blocks_over_four_clients_by_hand() -> None:
    """Query and value in each block, four directions in a pass: 1 + 4 * (1 - lowest block / 12) forward passes.

    Bands start at blocks 0, 3, 6, 9; of the cards the lowest of each hand are at blocks 0, 0, 1, 1.
    """
    depths = tuple(index // 2 for index in range(24))
    deal = dataclasses.replace(deal_of(24, 4), depths=depths, blocks=12)
    assert costs(deal, depth_split) == pytest.approx([5, 4, 3, 2])
    assert costs(deal, cyclic_split) == pytest.approx([5, 5, 1 + 44 / 12, 1 + 44 / 12])


def test_what_lies_above_the_blocks_costs_one_pass_whatever_the_directions() -> None:
    deal = dataclasses.replace(deal_of("ab", 1), depths=(0, 1), blocks=1)
    assert forward_passes(["b"], deal, directions=7) == 1.0
    assert forward_passes(["a", "b"], deal, directions=7) == 8.0
    assert forward_passes(["a"], dataclasses.replace(deal_of("a", 1), blocks=0), directions=7) == 1.0
