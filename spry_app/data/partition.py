"""Which node holds which rows: shards of a corpus, and the part of a shard held back. Rows are only selected here."""

import functools
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from datasets import Dataset

from spry_app.config import DataConfig
from spry_app.data.corpus import load_corpus, load_file
from spry_app.data.sources import read_train
from spry_app.errors import SpryError
from spry_app.stored import rows_of
from spry_app.tasks.columns import missing_field

Rule = Callable[[Dataset, DataConfig, int, int], list[list[int]]]
"""(shuffled columns row, label, [group], of rows that are dealt out; config; seed; count) -> those of every shard."""

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

_MIXTURES = 1 << 40
"""Number of their stream of random numbers; those of shards are far below."""
_FEWER = "Use fewer nodes (spry run --nodes, or num-supernodes in --federation-config)"


@dataclass(frozen=True)
class Shard:
    """One node's rows; the held-out ones are never trained on."""

    train: Dataset
    heldout: Dataset


def load_shard(config: DataConfig, seed: int, index: int, count: int, file: str = "") -> Shard:
    """Shard `index` of `count`, the same for the same arguments; or all rows of a node's own `file`.

    Raises SpryError where there is no such shard or it would be empty.
    """
    if file:
        rows = load_file(config, file)
    elif 0 <= index < count:
        rows = load_corpus(config).train.select(shards(config, seed, count)[index])
    else:
        raise SpryError(f"The node config has partition-id {index} of num-partitions {count}; ids count from 0.")
    sets = _sets(rows)
    count = len(sets or rows)
    order = _generator(seed, 1 + max(index, 0)).permutation(count)
    held = min(max(round(config.holdout * count), config.holdout > 0), count - 1)
    parts = (order[held:], order[:held])
    if sets is None:
        return Shard(*map(rows.select, parts))
    members = list(sets.values())
    return Shard(*(rows.select([row for number in some for row in members[number]]) for some in parts))


def label_counts(config: DataConfig, seed: int, count: int) -> tuple[tuple[str, ...], list[list[int]]] | None:
    """Names of the labels, and how many rows of each every shard of `data.source` has; None where rows have none."""
    corpus = load_corpus(config)
    if "label" not in corpus.train.column_names:
        return None
    labels = np.asarray(corpus.train["label"][:])
    classes = len(corpus.label_names)
    found = [np.bincount(labels[rows], minlength=classes).tolist() for rows in shards(config, seed, count)]
    return corpus.label_names, found


@functools.lru_cache(maxsize=4)
def shards(config: DataConfig, seed: int, count: int) -> list[list[int]]:
    """Row numbers of all shards of `data.source`: every row is in exactly one, and no shard is empty. Rows that belong
    together are dealt out as the first of them.
    """
    train = load_corpus(config).train
    sets = _sets(train)
    parts = len(sets or train)
    if count > parts:
        raise SpryError(f"{count} nodes cannot share the {parts} rows of data.source. {_FEWER} or more rows.")
    arrow = train.with_format("arrow")
    columns = {name: arrow[name][:] for name in ("label", "group") if name in train.column_names}
    all_rows = rows_of(pa.table({"row": np.arange(len(train)), **columns}))
    rows = (all_rows.select(list(sets)) if sets else all_rows).select(_generator(seed, 0).permutation(parts))
    found = PARTITIONS[config.partition](rows, config, seed, count)
    empty = sum(not shard for shard in found)
    if empty:
        raise SpryError(f"{empty} of {count} shards are empty. {_FEWER}, or a larger data.alpha ({config.alpha}).")
    return [[row for first in shard for row in sets[first]] for shard in found] if sets else found


def _sets(rows: Dataset) -> dict[int, list[int]] | None:
    """First row -> all rows that have its value of "together"; None where each row is on its own."""
    if "together" not in rows.column_names:
        return None
    sets: dict[str | int, list[int]] = defaultdict(list)
    for row, value in enumerate(rows["together"][:]):
        sets[value].append(row)
    return {members[0]: members for members in sets.values()}


def _iid(rows: Dataset, _config: DataConfig, _seed: int, count: int) -> list[list[int]]:
    from flwr_datasets.partitioner import IidPartitioner  # slow to import, and a node with its own file needs none

    return _parts(IidPartitioner(count), rows, count)


def _dirichlet(rows: Dataset, config: DataConfig, seed: int, count: int) -> list[list[int]]:
    """How each label is spread over the shards is drawn, or what each shard is made of."""
    if "label" not in rows.column_names:
        raise SpryError(
            f"data.partition is 'dirichlet', which deals rows out by their labels, and the rows of data.task "
            f"{config.task!r} have none: set data.partition to iid or natural."
        )
    if config.equal_sizes:
        return _mixtures(rows, config, seed, count)
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        num_partitions=count,
        partition_by="label",
        alpha=config.alpha,
        min_partition_size=1,
        self_balancing=False,
        seed=seed,
    )
    try:
        with warnings.catch_warnings(), np.errstate(invalid="raise"):
            warnings.simplefilter("ignore")  # it warns at every new draw, and raises after ten
            return _parts(partitioner, rows, count)
    except (ValueError, FloatingPointError) as error:
        raise SpryError(
            f"data.alpha {config.alpha} leaves some of {count} shards empty, however often it is drawn. {_FEWER}, a "
            "larger data.alpha, or data.equal-sizes=true."
        ) from error


def _mixtures(rows: Dataset, config: DataConfig, seed: int, count: int) -> list[list[int]]:
    """Equal sizes: for each shard a mixture of the labels is drawn, and its rows by that, as long as a label lasts
    (arXiv 1909.06335, section 3; there the concentrations sum to alpha, here to alpha times the labels).

    Shards take a row each in turn, so that what is left at the end falls to all of them.
    """
    draw, members = _generator(seed, _MIXTURES), defaultdict[int, list[int]](list)
    for row, label in zip(rows["row"], rows["label"], strict=True):
        members[label].append(row)
    left = list(members.values())
    shares = np.array([len(label) for label in left]) / len(rows)
    mixtures = draw.dirichlet(config.alpha * len(left) * shares, size=count) + 1e-12
    found: list[list[int]] = [[] for _ in range(count)]
    for number in range(len(rows)):
        mixture = mixtures[number % count] * [bool(label) for label in left]
        found[number % count].append(left[draw.choice(len(left), p=mixture / mixture.sum())].pop())
    return found


def _natural(rows: Dataset, config: DataConfig, _seed: int, count: int) -> list[list[int]]:
    """Whole groups, dealt to the shards in turn; the rows, and so the groups, come shuffled."""
    key = f"data.natural-field is {config.natural_field!r}, but data.source {config.source!r} has"
    if "group" not in rows.column_names:
        columns = missing_field(config.natural_field, read_train(config).column_names)
        raise SpryError(f"{key} {columns} Or set data.partition to iid or dirichlet.")
    members: dict[str | int | None, list[int]] = defaultdict(list)
    for row, group in zip(rows["row"], rows["group"], strict=True):
        members[group].append(row)
    if None in members:
        raise SpryError(
            f"{key} {len(members[None])} rows where it is missing, the first is row {min(members[None]) + 1}."
        )
    if len(members) < count:
        raise SpryError(f"{key} {len(members)} different values for {count} nodes. {_FEWER}.")
    groups = list(members.values())
    return [list(chain.from_iterable(groups[index::count])) for index in range(count)]


def _parts(partitioner: "Partitioner", rows: Dataset, count: int) -> list[list[int]]:
    partitioner.dataset = rows
    return [partitioner.load_partition(index)["row"][:] for index in range(count)]


PARTITIONS: dict[str, Rule] = {"iid": _iid, "dirichlet": _dirichlet, "natural": _natural}


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream))))
