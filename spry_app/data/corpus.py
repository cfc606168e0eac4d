"""Rows as a task wants them: its columns, and an optional group. Where rows lie, and what columns mean, is not known
here.
"""

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from spry_app import tasks
from spry_app.config import DataConfig
from spry_app.data.sources import read_file, read_test, read_train
from spry_app.errors import SpryError
from spry_app.stored import digest_of, digest_of_code, large, name_of, parts_of, rows_of, size_of, stored
from spry_app.tasks import get_task
from spry_app.tasks.columns import dealt_by, distinct

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Rows with the columns of the task (of classification: text, text_pair, label; "together", where rows with the
    same value are never split), and group (natural partition only, if it exists). label_names: of the classes, () where
    the task has none.
    """

    train: Dataset
    test: Dataset | None
    label_names: tuple[str, ...]


@functools.lru_cache(maxsize=2)
def load_corpus(config: DataConfig) -> Corpus:
    """Training and test rows of `data.source`, read once a process. Raises SpryError for anything unusable."""
    task, where = get_task(config), f"data.source {config.source!r}"
    raw, raw_test = _labelled(read_train(config), config, where), read_test(config)
    names = task.classes(raw, config, where) if task.classes else ()
    where_test = f"the test set (data.test {config.test!r})"
    test = None if raw_test is None else _rows(_labelled(raw_test, config, where_test), config, names, where_test)
    return Corpus(_rows(raw, config, names, where), test, names)


def label_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the classes in the order of their ids: from the config where it says, else from `data.source`; () where
    the task has none.
    """
    task = get_task(config)
    return task.names(config) or (load_corpus(config).label_names if task.classes else ())


def load_file(config: DataConfig, path: str) -> Dataset:
    """A node's own rows. The classes come from what all nodes share, never from this file."""
    key = 'node-config key "data"'
    raw = _labelled(read_file(path, key, config.cache_mib), config, f"{key} {path!r}")
    try:
        names = label_names(config)
    except SpryError as error:
        raise SpryError(
            f"{key} names this node's own rows, but the order of the classes must be the same on all nodes: set "
            f"data.label-names, or data.num-labels where labels are numbers. (Tried data.source: {error})"
        ) from error
    return _rows(raw, config, names, f"{key} {path!r}")


def _labelled(raw: Dataset, config: DataConfig, where: str) -> Dataset:
    """Without the rows that have no label, if `data.unlabelled` says so."""
    if config.unlabelled == "refuse" or config.label_field not in raw.column_names:
        return raw
    labels, which = distinct(raw, config.label_field)
    known = np.flatnonzero(np.array([label is not None and label != -1 for label in labels], bool)[which])
    if len(known) < len(raw):
        _log.warning("%s: %d of %d rows have no label and are left out.", where, len(raw) - len(known), len(raw))
    return raw.select(known)


def _rows(raw: Dataset, config: DataConfig, names: tuple[str, ...], where: str) -> Dataset:
    """In memory; of many rows on disk, made a part at a time."""
    if not large(size_of(raw)) or not len(raw):
        table = _columns(raw, config, names, where)
    else:
        content = {"rows": digest_of(raw), "data": config.model_dump(exclude={"cache_mib"}), "names": names}
        name = name_of("columns", content | {"code": digest_of_code(Path(tasks.__file__).parent)})
        own = ":" in config.task  # nobody can tell whether what its code depends on has changed
        make = functools.partial(_parts, raw, config, names, where)
        table = stored(name, lambda _facts: make(), 0 if own else config.cache_mib).table
    if "label" not in table.column_names and config.partition == "dirichlet" and config.label_field in raw.column_names:
        table = table.append_column("label", pa.array(dealt_by(raw, config.label_field)))
    return rows_of(table)


def _parts(raw: Dataset, config: DataConfig, names: tuple[str, ...], where: str) -> Iterator[pa.Table]:
    for start, some in parts_of(raw):
        yield _columns(some, config, names, f"rows {start + 1} to {start + len(some)} of {where}")


def _columns(raw: Dataset, config: DataConfig, names: tuple[str, ...], where: str) -> pa.Table:
    columns = dict(get_task(config).columns(raw, config, names, where))
    if config.partition == "natural" and config.natural_field in raw.column_names:
        columns["group"] = raw.with_format("arrow")[config.natural_field][:]
    return pa.table(columns)
