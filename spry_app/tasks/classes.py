"""A column of labels, names or numbers, as classes and their ids. Nothing here knows what is classified."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import ClassLabel, Dataset

from spry_app.config import DataConfig
from spry_app.errors import SpryError
from spry_app.tasks.columns import distinct

Label = str | int | None

_MOST_CLASSES = 10_000
"""More than this, counted from the data, is taken for a column that holds something else."""


def configured_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the classes where the config gives them, or their number; else (). Raises SpryError."""
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


def names_of(raw: Dataset, config: DataConfig, where: str) -> tuple[str, ...]:
    """Names of the classes in the order of their ids: as configured, as the source declares them, or as they occur."""
    (labels, _), feature = _labels(raw, config.label_field, where), raw.features[config.label_field]
    declared = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
    configured = configured_names(config)
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


def _labels(raw: Dataset, field: str, where: str) -> tuple[list[Label], npt.NDArray[np.int64]]:
    """The different labels as names or numbers, and which of them each row has; numbers that stand for a declared name
    become that name.
    """
    feature, (values, which) = raw.features[field], distinct(raw, field)
    if isinstance(feature, ClassLabel):
        return [feature.names[value] if value is not None and value >= 0 else value for value in values], which
    # One missing number turns a CSV column into floats.
    labels = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
    kinds = {type(label) for label in labels if label is not None}
    if not (kinds <= {int, bool} or kinds == {str}):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise SpryError(
            f"data.label-field {field!r} of {where} holds {names}; labels are all whole numbers or all names."
        )
    return labels, which


def ids(raw: Dataset, field: str, names: tuple[str, ...], where: str) -> pa.Array:
    """The label column as class ids. Raises SpryError for a label that is none of `names`."""
    labels, which = _labels(raw, field, where)
    known = {name: number for number, name in enumerate(names)}
    numbers = [known.get(label, -1) if isinstance(label, str) else label for label in labels]
    found = np.array([-1 if n is None or not 0 <= n < len(names) else int(n) for n in numbers], np.int64)[which]
    if (found < 0).any():
        row = int((found < 0).argmax())
        allowed = f"a number from 0 to {len(names) - 1}"
        if names[0] != "0":
            allowed = f"one of {_few(names)}, or {allowed}"
        raise SpryError(
            f"data.label-field {field!r} is {labels[which[row]]!r} in row {row + 1} of {where}; it must be {allowed} "
            "(see data.num-labels and data.label-names; data.unlabelled for rows without a label)."
        )
    return pa.array(found)


def _few(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
