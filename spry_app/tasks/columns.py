"""Columns of rows as they come, checked, with errors that name the key to change. What they are for, each task says."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from spry_app.errors import SpryError

_PLACE = re.compile(r"\{([^{}]+)\}")
"""Where a column's text goes in a template."""


def require(raw: Dataset, wanted: Mapping[str, str], where: str) -> None:
    """That there are rows, and the columns `wanted` (run-config key -> column, or text with columns in braces). Raises
    SpryError.
    """
    if not raw.num_rows:
        raise SpryError(f"{where} has no rows; it needs at least one.")
    for key, field in wanted.items():
        for name in named(field):
            if name not in raw.column_names:
                raise SpryError(f"{key} is {field!r}, but {where} has {missing_field(name, raw.column_names)}")


def named(field: str) -> list[str]:
    """The columns that a template is made of, or the one that it is."""
    return _PLACE.findall(field) or [field]


def missing_field(field: str, columns: Sequence[str]) -> str:
    """End of the sentence "... has": the columns there are, and the one most alike."""
    near = difflib.get_close_matches(field, columns, n=1)
    return f"the columns {', '.join(columns)}." + (f" Did you mean {near[0]!r}?" if near else "")


def text(raw: Dataset, key: str, field: str, where: str) -> pa.ChunkedArray:
    """A column of text without gaps, or what a template ("{question} {answer}") makes of several. Raises SpryError."""
    literals, names = _PLACE.split(field)[::2], _PLACE.findall(field)
    if names:
        parts: list[Any] = [literals[0]]
        for name, literal in zip(names, literals[1:], strict=True):
            parts += [text(raw, key, name, where).cast(pa.string()), literal]
        return pc.binary_join_element_wise(*parts, "")
    if getattr(raw.features[field], "dtype", "") not in ("string", "large_string"):
        raise SpryError(f"{key} {field!r} of {where} holds {raw.features[field]}; it must hold text.")
    return whole(raw, key, field, where)


def whole(raw: Dataset, key: str, field: str, where: str) -> pa.ChunkedArray:
    """A column without gaps. Raises SpryError."""
    column = raw.with_format("arrow")[field][:]
    if column.null_count:
        row = column.is_null().to_pylist().index(True) + 1
        raise SpryError(f"{key} {field!r} is missing in row {row} of {where} ({column.null_count} in all).")
    return column


def distinct(raw: Dataset, field: str) -> tuple[list[Any], npt.NDArray[np.int64]]:
    """The different values of a column, and of each row the number of its own."""
    column = raw.with_format("arrow")[field][:]
    try:
        found = column.combine_chunks().dictionary_encode("encode")
    except pa.ArrowNotImplementedError:  # lists, or JSON of several kinds
        return list(raw[field][:]), np.arange(len(raw))
    parts = found.chunks if isinstance(found, pa.ChunkedArray) else [found]
    if not parts:
        return [], np.arange(0)
    return parts[0].dictionary.to_pylist(), parts[0].indices.to_numpy(zero_copy_only=False).astype(np.int64)


def dealt_by(raw: Dataset, field: str) -> npt.NDArray[np.int64]:
    """By what a Dirichlet partition deals out rows that have no classes: a number for each value of a column."""
    values, which = distinct(raw, field)
    numbers = {value: number for number, value in enumerate(sorted(set(map(str, values))))}
    return np.array([numbers[str(value)] for value in values], np.int64)[which]
