"""Hidden states kept for a whole run: the same to the bit whatever came before, in groups, and shared by benchmarks."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prefix_rows import ROWS, WIDTH, assert_same, config, hidden_states, made_in, node_of, rows_through_the_lowest

from spry_app.prefix import LastingPrefixCache, Shared, shared

FEW = 9 * 2 * 11 * WIDTH
"""Bytes: half of them are for nine of the longest rows or some more of the shortest, which is not all."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_in(tmp_path_factory.mktemp("prefix"))


@pytest.fixture
def rows_through_the_lowest_block(folder: Path) -> Iterator[list[int]]:
    with rows_through_the_lowest(node_of(config(folder))) as seen:
        yield seen


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("memory", [1 << 20, FEW])
def test_what_outlives_a_task_does_not_depend_on_what_came_before(folder: Path, memory: int, at_once: int) -> None:
    """To the bit, with room for all rows and with room for a few: another order, other neighbours, kept or not."""
    node = node_of(config(folder))
    order = node.train.by_length(range(ROWS))
    batches = [order[:3], [order[0], order[-1], order[7], order[-2]], order[4:7]]
    seen = []
    for turns in ([0, 1, 2], [2, 1, 0, 1], [1, 1]):
        kept = LastingPrefixCache(node.adapted, node.train, 1, memory, 0, at_once)
        found = {turn: kept.entering([batches[turn]])[0] for turn in turns}
        seen.append(found[1])
    first, *others = seen
    assert first is not None
    assert_same(node, batches[1], first.hidden, hidden_states(node, batches[1]))
    assert all(other is not None and torch.equal(other.hidden, first.hidden) for other in others)


def test_what_outlives_a_task_is_computed_in_groups_and_once(
    folder: Path, rows_through_the_lowest_block: list[int]
) -> None:
    node = node_of(config(folder))
    order = node.train.by_length(range(ROWS))
    kept = LastingPrefixCache(node.adapted, node.train, 1, 1 << 20, 0, at_once=4)
    for _ in range(2):
        kept.entering([[order[0], order[5], order[2]]])
    assert rows_through_the_lowest_block == [4, 4]
    for first in range(0, ROWS, 8):
        kept.entering([order[first : first + 8]])
    assert sum(rows_through_the_lowest_block) == ROWS


def test_what_runs_share_is_computed_once_and_counted_in_each(
    folder: Path, rows_through_the_lowest_block: list[int]
) -> None:
    """The hidden states are the same ones, and a run outside sees nothing of them."""
    node = node_of(config(folder))
    rows = node.train.by_length(range(ROWS))[2:9]
    between: Shared = {}
    seen = []
    for run_ in range(3):
        with shared(between) if run_ < 2 else contextlib.nullcontext():
            kept = LastingPrefixCache(node.adapted, node.train, 1, 1 << 20, 0, at_once=4)
            states = kept.entering([rows])[0]
        assert states is not None
        seen.append((states.hidden, kept.forwards, sum(rows_through_the_lowest_block)))
    (first, passes, ran), (again, as_many, still), (alone, _, more) = seen
    assert torch.equal(first, again) and torch.equal(first, alone)
    assert passes == as_many > 0 and ran == still > 0 and more == 2 * ran


def test_rows_that_are_not_to_be_kept_pass_as_they_are_asked_for(
    folder: Path, rows_through_the_lowest_block: list[int]
) -> None:
    """The longest ones, which take the most memory; nobody beside them is computed."""
    node = node_of(config(folder))
    order = node.train.by_length(range(ROWS))
    kept = LastingPrefixCache(node.adapted, node.train, 1, FEW, 0, at_once=4)
    for _ in range(2):
        kept.entering([[order[0], order[-1], order[-2]]])
    assert rows_through_the_lowest_block == [4, 2, 2]
