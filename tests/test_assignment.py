"""The layer split: coverage, balance and rotation, for any numbers of units and clients."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from spry_app.methods.assignment import cyclic_split, every_unit

sizes = st.integers(1, 40)
rounds = st.integers(0, 1000)


def names(count: int) -> list[str]:
    return [f"unit{i}" for i in range(count)]


@given(units=sizes, clients=sizes, round_=rounds)
def test_every_unit_is_trained_and_every_client_has_work(units: int, clients: int, round_: int) -> None:
    hands = cyclic_split(names(units), clients, round_)
    assert len(hands) == clients
    assert {unit for hand in hands for unit in hand} == set(names(units))
    assert all(hands)
    assert all(len(set(hand)) == len(hand) for hand in hands)


@given(units=sizes, clients=sizes, round_=rounds)
def test_work_and_coverage_are_balanced_to_one(units: int, clients: int, round_: int) -> None:
    hands = cyclic_split(names(units), clients, round_)
    held = Counter(unit for hand in hands for unit in hand)
    assert max(map(len, hands)) - min(map(len, hands)) <= 1
    assert max(held.values()) - min(held.values()) <= 1


@given(units=sizes, clients=sizes, start=rounds)
def test_over_as_many_rounds_as_clients_each_client_meets_every_unit(units: int, clients: int, start: int) -> None:
    met = [set() for _ in range(clients)]
    for round_ in range(start, start + clients):
        for client, hand in enumerate(cyclic_split(names(units), clients, round_)):
            met[client].update(hand)
    assert all(units_met == set(names(units)) for units_met in met)


def test_three_units_over_two_clients_by_hand() -> None:
    assert cyclic_split(["a", "b", "c"], 2, 0) == [["a", "c"], ["b"]]
    assert cyclic_split(["a", "b", "c"], 2, 1) == [["b"], ["a", "c"]]


def test_two_units_over_three_clients_by_hand() -> None:
    assert cyclic_split(["a", "b"], 3, 0) == [["a"], ["b"], ["a"]]
    assert cyclic_split(["a", "b"], 3, 1) == [["a"], ["a"], ["b"]]


def test_nothing_to_deal_leaves_empty_hands() -> None:
    assert cyclic_split([], 2, 5) == [[], []]


@given(units=sizes, clients=sizes, round_=rounds)
def test_without_a_split_everyone_trains_everything(units: int, clients: int, round_: int) -> None:
    assert every_unit(names(units), clients, round_) == [names(units)] * clients
