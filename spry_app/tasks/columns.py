"""Columns of rows as they come, checked, with errors that name the key to change. What they are for, each task says."""

import difflib
import re
from collections.abc import Mapping, Sequence
from itertools import chain

import pyarrow as pa
from datasets import Dataset

from spry_app.config import DataConfig
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
        parts = zip(*(text(raw, key, name, where).to_pylist() for name in names), strict=True)
        rows = ("".join(chain.from_iterable(zip(literals, (*row, ""), strict=True))) for row in parts)
        return pa.chunked_array([pa.array(rows, pa.string())])
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


def dealt_by(raw: Dataset, config: DataConfig) -> dict[str, list[int]]:
    """The column label, by which a Dirichlet partition deals out rows that have no classes: a number for each value of
    `data.label-field`, if there is such a column.
    """
    if config.partition != "dirichlet" or config.label_field not in raw.column_names:
        return {}
    values = [str(value) for value in raw[config.label_field]]
    numbers = {value: number for number, value in enumerate(sorted(set(values)))}
    return {"label": [numbers[value] for value in values]}
