"""Shards of the rows, what is held out of them, and the order in which batches visit them."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import ROWS, local

from spry_app.config import DataConfig
from spry_app.data import batches, load_corpus, load_shard
from spry_app.data.partition import shards
from spry_app.errors import SpryError

PARTITION = st.sampled_from(["iid", "dirichlet", "natural"])
pytestmark = pytest.mark.usefixtures("own_cache")


@settings(max_examples=60, deadline=None)
@given(partition=PARTITION, equal=st.booleans(), alpha=st.sampled_from([0.05, 1.0, 100.0]), data=st.data())
def test_every_row_is_in_exactly_one_shard_and_no_shard_is_empty(
    sentences: str, partition: str, equal: bool, alpha: float, data: st.DataObject
) -> None:
    seed, count = data.draw(st.integers(0, 2**63 - 1)), data.draw(st.integers(1, 130))
    config = local(sentences, partition=partition, equal_sizes=equal, alpha=alpha)
    try:
        found = shards(config, seed, count)
    except SpryError as error:
        assert "nodes" in str(error) and (count > 1)
        return
    assert len(found) == count and all(found)
    assert sorted(row for shard in found for row in shard) == list(range(len(ROWS)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), count=st.integers(1, 6))
def test_a_natural_group_is_never_split(sentences: str, seed: int, count: int) -> None:
    homes: dict[str, set[int]] = {}
    for number, shard in enumerate(shards(local(sentences, partition="natural"), seed, count)):
        for row in shard:
            homes.setdefault(ROWS[row]["user"], set()).add(number)
    assert all(len(numbers) == 1 for numbers in homes.values())


@settings(max_examples=30, deadline=None)
@given(holdout=st.floats(0, 0.99), seed=st.integers(0, 9), count=st.integers(1, 120), data=st.data())
def test_held_out_rows_are_never_trained_on(
    sentences: str, holdout: float, seed: int, count: int, data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, count - 1))
    config = local(sentences, holdout=holdout)
    shard = load_shard(config, seed, index, count)
    train, heldout = shard.train["text"][:], shard.heldout["text"][:]
    assert sorted(train + heldout) == sorted(ROWS[row]["text"] for row in shards(config, seed, count)[index])
    assert train and not set(train) & set(heldout)
    assert bool(heldout) == (holdout > 0 and len(train) + len(heldout) > 1)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "natural"])
def test_a_shard_depends_on_seed_and_count_and_on_nothing_else(sentences: str, partition: str) -> None:
    config = local(sentences, partition=partition)
    first = load_shard(config, 1, 0, 4)
    state, numpy_state = random.getstate(), str(np.random.get_state())
    for seed, count in ((2, 4), (1, 3)):
        assert set(shards(config, seed, count)[0]) != set(shards(config, 1, 4)[0])
    assert load_shard(local(sentences), 1, 0, 1).heldout[:] != load_shard(local(sentences), 2, 0, 1).heldout[:]
    shards.cache_clear()
    load_corpus.cache_clear()
    again = load_shard(config, 1, 0, 4)
    assert again.train[:] == first.train[:] and again.heldout[:] == first.heldout[:]
    assert (random.getstate(), str(np.random.get_state())) == (state, numpy_state)


def test_a_small_alpha_makes_shards_less_alike() -> None:
    def distance(alpha: float) -> float:
        config = DataConfig(partition="dirichlet", alpha=alpha)
        labels = load_corpus(config).train["label"][:]
        overall = np.bincount(labels, minlength=12) / len(labels)
        apart = []
        for shard in shards(config, 0, 10):
            own = np.bincount([labels[row] for row in shard], minlength=12) / len(shard)
            apart.append(np.abs(own - overall).sum() / 2)
        return float(np.mean(apart))

    assert distance(0.1) > distance(1.0) + 0.1 > distance(100.0) + 0.2


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0, 100.0])
def test_equal_sizes_make_shards_of_one_size_however_unlike_their_labels_are(alpha: float) -> None:
    config = DataConfig(partition="dirichlet", alpha=alpha, equal_sizes=True)
    sizes = [len(shard) for shard in shards(config, 0, 40)]
    assert max(sizes) - min(sizes) <= 1


def test_a_mixture_is_dirichlet() -> None:
    """Of one label's share in the first half of many shards: mean 1 / 12, variance p (1 - p) / (12 alpha + 1)."""
    config = DataConfig(partition="dirichlet", alpha=0.5, equal_sizes=True)
    labels = load_corpus(config).train["label"][:]
    shares = np.array(
        [
            np.bincount([labels[row] for row in shard[: len(shard) // 2]], minlength=12) / (len(shard) // 2)
            for seed in range(3)
            for shard in shards(config, seed, 40)
        ]
    )
    overall = np.bincount(labels, minlength=12) / len(labels)
    rows = len(labels) // 80
    expected = overall * (1 - overall) * (1 / 7 + (1 - 1 / 7) / rows)  # drawn by the mixture, and then from it
    assert np.allclose(shares.var(0).mean(), expected.mean(), rtol=0.1)


def test_three_hundred_nodes_get_a_household_each() -> None:
    config = DataConfig()
    groups = load_corpus(config).train["group"][:]
    assert all(len({groups[row] for row in shard}) == 1 for shard in shards(config, 0, 300))


# Order of batches


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 200), batch_size=st.integers(1, 40), seed=st.tuples(st.integers(0, 2**63), st.integers(0)))
def test_a_pass_visits_every_row_once_in_batches_of_the_size_asked(
    count: int, batch_size: int, seed: tuple[int, int]
) -> None:
    visited = list(batches(count, batch_size, seed))
    assert sorted(row for batch in visited for row in batch) == list(range(count))
    assert all(len(batch) == batch_size for batch in visited[:-1])
    assert visited == list(batches(count, batch_size, seed))


def test_another_seed_gives_another_order() -> None:
    orders = {str(list(batches(50, 8, seed))) for seed in [(0, 1), (1, 0), (1, 1), (0, 1, 0, 1)]}
    assert len(orders) == 4
