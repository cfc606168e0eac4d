"""Many rows as tokens on disk, which the next start on this machine finds again. What tokens are made of, each task
says.
"""

import hashlib
import importlib.metadata
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from spry_app.config import DataConfig
from spry_app.stored import Facts, digest_of, digest_of_code, large, name_of, parts_of, size_of, stored
from spry_app.tasks.encoded import Encoded
from spry_app.tasks.task import LearningTask

logger = logging.getLogger(__name__)

_SMALL = frozenset({"attention_mask", "token_type_ids", "special_tokens_mask"})
"""Features whose values have room in a byte."""
_LIBRARIES = ("transformers", "tokenizers", "pyarrow")


def encode_rows(
    task: LearningTask, rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, training: bool
) -> Encoded:
    """`task.encode`, to the bit; of more than a MiB of rows a part at a time onto disk, where tokens then stay."""
    if not large(size_of(rows)) or not len(rows):
        return task.encode(rows, tokenizer, config, training)
    own = ":" in config.task  # nobody can tell whether what its code depends on has changed
    name = name_of("tokens", _depends_on(task, rows, tokenizer, config))
    try:
        found = stored(
            name,
            lambda facts: _tables(task, rows, tokenizer, config, facts),
            0 if own else config.cache_mib,
        )
    except _NotForDisk:
        return task.encode(rows, tokenizer, config, training)
    logger.info("Tokens of %d rows: %s.", len(rows), "read from the cache" if found.again else "made")
    whole = _encoded(task, tokenizer, found.table, found.facts)
    return task.gather(whole, config) if training else whole


class _NotForDisk(Exception):
    """A task keeps more of its rows than tokens and does not say how that is stored."""


def _depends_on(
    task: LearningTask, rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> dict[str, Any]:
    """Everything that tokens follow from, but for the code of a task of the user's own."""
    return {
        "rows": digest_of(rows),
        "tokenizer": _digest_of_tokenizer(tokenizer),
        "data": config.model_dump(exclude={"cache_mib"}),
        "noun": task.noun,
        "code": digest_of_code(Path(__file__).parent),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def _digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of its class and its files, without the truncation and padding of the last call, which come and go."""
    found = hashlib.sha256(type(tokenizer).__name__.encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            text = path.read_bytes()
            if path.name == "tokenizer.json":
                text = json.dumps({**json.loads(text), "truncation": None, "padding": None}).encode()
            found.update(path.name.encode() + b"\0" + hashlib.sha256(text).digest())
    return found.hexdigest()


def _tables(
    task: LearningTask, rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, facts: Facts
) -> Iterator[pa.Table]:
    facts |= {"cut": 0, "dropped": 0, "padding": ""}
    schema: pa.Schema | None = None
    for start, some in parts_of(rows):
        part = task.encode(some, tokenizer, config, False)
        facts["cut"], facts["dropped"] = facts["cut"] + part.cut, facts["dropped"] + part.dropped
        facts["padding"] = part.padding
        if not len(part):
            continue
        table = _table(task, part, 0 if "together" in rows.column_names else start)
        schema = schema or table.schema
        yield table.cast(schema)


def _table(task: LearningTask, part: Encoded, start: int) -> pa.Table:
    """start: added to the numbers of rows by which it knows what is judged together."""
    columns: dict[str, Any] = {}
    for name, lists in part.features.items():
        columns[f"feature {name}"] = pa.array(lists, pa.list_(pa.int8() if name in _SMALL else pa.int32()))
    for name, values in part.targets.items():
        columns[f"target {name}"] = pa.array(values, pa.list_(pa.int32()) if isinstance(values[0], list) else None)
    if part.terms:
        columns["terms"] = pa.array(part.terms, pa.int64())
    if part.together:
        shifted = [row + start if isinstance(row, int) else row for row in part.together]
        columns["together"] = pa.array(shifted)
    if part.kept:
        if task.kept is None:
            raise _NotForDisk
        columns["kept"] = pa.array(list(map(task.kept.write, part.kept)), task.kept.type)
    return pa.table(columns)


def _encoded(task: LearningTask, tokenizer: PreTrainedTokenizerBase, table: pa.Table, facts: Facts) -> Encoded:
    columns = {name: _column(table.column(name)) for name in table.column_names if name != "kept"}
    kept: Sequence[Any] = ()
    if task.kept and "kept" in table.column_names:
        kept = _Values(table.column("kept"), task.kept.read)
    return Encoded(
        features=_named("feature ", columns),
        targets=_named("target ", columns),
        cut=facts["cut"],
        tokenizer=tokenizer,
        task=task,
        dropped=facts["dropped"],
        terms=columns.get("terms", ()),
        padding=facts["padding"],
        kept=kept,
        together=columns.get("together", ()),
    )


def _named(prefix: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): column for name, column in columns.items() if name.startswith(prefix)}


def _column(column: pa.ChunkedArray) -> "_Values":
    return _Tokens(column) if pa.types.is_list(column.type) else _Values(column)


class _Values(Sequence[Any]):
    """Of each row a value, read when it is asked for."""

    def __init__(self, column: pa.ChunkedArray, read: Any = None) -> None:
        self._column, self._convert = column, read

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, at: int) -> Any: ...
    @overload
    def __getitem__(self, at: slice) -> list[Any]: ...
    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return [self[row] for row in range(len(self))[at]]
        return self._value(self._column[at])

    def _value(self, scalar: pa.Scalar) -> Any:
        value = scalar.as_py()
        return self._convert(value) if self._convert else value


class _Tokens(_Values):
    """Of each row a list of whole numbers. lengths: how many, of all rows; in memory, 4 bytes a row."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        super().__init__(column)
        self.lengths = pc.list_value_length(column).to_numpy().astype(np.int32)

    def _value(self, scalar: pa.Scalar) -> list[int]:
        values: list[int] = scalar.values.to_numpy(zero_copy_only=False).tolist()
        return values
