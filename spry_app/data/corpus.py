"""What the columns mean: text, optional second text, label number, optional group. Where rows lie is not known here."""

import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
from datasets import ClassLabel, Dataset
from datasets.table import InMemoryTable

from spry_app.config import DataConfig
from spry_app.data.sources import read_file, read_test, read_train
from spry_app.errors import SpryError

Label = str | int | None

_MOST_CLASSES = 10_000
"""More than this, counted from the data, is taken for a column that holds something else."""


@dataclass(frozen=True)
class Corpus:
    """Rows with the columns text, text_pair (pairs only), label (id), group (natural partition only, if it exists)."""

    train: Dataset
    test: Dataset | None
    label_names: tuple[str, ...]


@functools.lru_cache(maxsize=2)
def load_corpus(config: DataConfig) -> Corpus:
    """Training and test rows of `data.source`, read once a process. Raises SpryError for anything unusable."""
    raw, raw_test = read_train(config), read_test(config)
    where = f"data.source {config.source!r}"
    _require_fields(raw, config, where)
    feature = raw.features[config.label_field]
    declared = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
    names = _label_names(_labels(raw, config.label_field, where), declared, config, where)
    where_test = f"the test set (data.test {config.test!r})"
    test = None if raw_test is None else _rows(raw_test, config, names, where_test)
    return Corpus(_rows(raw, config, names, where), test, names)


def label_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the classes in the order of their ids: from the config where it says, else from `data.source`."""
    return _configured_names(config) or load_corpus(config).label_names


def load_file(config: DataConfig, path: str) -> Dataset:
    """A node's own rows. The classes come from what all nodes share, never from this file."""
    key = 'node-config key "data"'
    raw = read_file(path, key)
    try:
        names = label_names(config)
    except SpryError as error:
        raise SpryError(
            f"{key} names this node's own rows, but the order of the classes must be the same on all nodes: set "
            f"data.label-names, or data.num-labels where labels are numbers. (Tried data.source: {error})"
        ) from error
    return _rows(raw, config, names, f"{key} {path!r}")


def _rows(raw: Dataset, config: DataConfig, names: tuple[str, ...], where: str) -> Dataset:
    _require_fields(raw, config, where)
    columns = {"text": _text(raw, "data.text-field", config.text_field, where)}
    if config.text_pair_field:
        columns["text_pair"] = _text(raw, "data.text-pair-field", config.text_pair_field, where)
    labels = _ids(_labels(raw, config.label_field, where), names, config.label_field, where)
    columns["label"] = pa.array(labels, pa.int64())
    if config.partition == "natural" and config.natural_field in raw.column_names:
        columns["group"] = raw.with_format("arrow")[config.natural_field][:]
    return Dataset(InMemoryTable(pa.table(columns)))


def _require_fields(raw: Dataset, config: DataConfig, where: str) -> None:
    if not raw.num_rows:
        raise SpryError(f"{where} has no rows; it needs at least one.")
    wanted = {"data.text-field": config.text_field, "data.label-field": config.label_field}
    if config.text_pair_field:
        wanted["data.text-pair-field"] = config.text_pair_field
    for key, field in wanted.items():
        if field not in raw.column_names:
            raise SpryError(f"{key} is {field!r}, but {where} has {missing_field(field, raw.column_names)}")


def missing_field(field: str, columns: Sequence[str]) -> str:
    """End of the sentence "... has": the columns there are, and the one most alike."""
    near = difflib.get_close_matches(field, columns, n=1)
    return f"the columns {', '.join(columns)}." + (f" Did you mean {near[0]!r}?" if near else "")


def _text(raw: Dataset, key: str, field: str, where: str) -> pa.ChunkedArray:
    if getattr(raw.features[field], "dtype", "") not in ("string", "large_string"):
        raise SpryError(f"{key} {field!r} of {where} holds {raw.features[field]}; it must hold text.")
    column = raw.with_format("arrow")[field][:]
    if column.null_count:
        row = column.is_null().to_pylist().index(True) + 1
        raise SpryError(f"{key} {field!r} is missing in row {row} of {where} ({column.null_count} in all).")
    return column


def _configured_names(config: DataConfig) -> tuple[str, ...]:
    names = tuple(name.strip() for name in config.label_names.split(",") if name.strip())
    if names and (len(set(names)) < len(names) or config.num_labels not in (0, len(names))):
        raise SpryError(
            f"data.label-names is {config.label_names!r} and data.num-labels is {config.num_labels}; the names must "
            "differ from each other, and data.num-labels must be their number or 0."
        )
    names = names or tuple(str(number) for number in range(config.num_labels))
    if len(names) == 1:
        raise SpryError("data.num-labels and data.label-names give one class; at least two are needed.")
    return names


def _label_names(labels: Sequence[Label], declared: tuple[str, ...], config: DataConfig, where: str) -> tuple[str, ...]:
    """Names of the classes; `declared` are those that the source itself declares, if any."""
    configured = _configured_names(config)
    if config.label_names:
        return configured
    names = {label for label in labels if isinstance(label, str)}
    if declared or names:
        found = declared or tuple(sorted(names))
    else:
        highest = max((label for label in labels if isinstance(label, int)), default=-1)
        if highest >= _MOST_CLASSES:
            raise SpryError(f"{where} has the label {highest}; is data.label-field {config.label_field!r} a label?")
        found = configured or tuple(str(number) for number in range(highest + 1))
    if len(found) < 2 or (configured and len(configured) != len(found)):
        wanted = f"data.num-labels is {len(configured)}" if configured else "at least two are needed"
        raise SpryError(f"{where} has {len(found)} kinds of label ({_few(found)}), but {wanted}.")
    return found


def _labels(raw: Dataset, field: str, where: str) -> list[Label]:
    """The label column as names or numbers; numbers that stand for a declared name become that name."""
    feature, values = raw.features[field], list(raw[field])
    if isinstance(feature, ClassLabel):
        return [feature.names[value] if value is not None and value >= 0 else value for value in values]
    # One missing number turns a CSV column into floats.
    labels = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
    kinds = {type(label) for label in labels if label is not None}
    if not (kinds <= {int, bool} or kinds == {str}):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise SpryError(
            f"data.label-field {field!r} of {where} holds {names}; labels are all whole numbers or all names."
        )
    return labels


def _ids(labels: Sequence[Label], names: tuple[str, ...], field: str, where: str) -> list[int]:
    ids = {name: number for number, name in enumerate(names)}
    found = [ids.get(label, -1) if isinstance(label, str) else label for label in labels]
    for row, number in enumerate(found):
        if not isinstance(number, int) or not 0 <= number < len(names):
            allowed = f"a number from 0 to {len(names) - 1}"
            if names[0] != "0":
                allowed = f"one of {_few(names)}, or {allowed}"
            raise SpryError(
                f"data.label-field {field!r} is {labels[row]!r} in row {row + 1} of {where}; it must be {allowed} "
                "(see data.num-labels and data.label-names)."
            )
    return [int(number) for number in found if number is not None]


def _few(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
