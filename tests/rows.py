"""Rows of a made-up data set, and files of them in each format. Not a test itself."""

from pathlib import Path
from typing import Any

import datasets

from spry_app.config import DataConfig

Row = dict[str, Any]

ROWS: list[Row] = [
    {"text": f"sentence {number}", "label": number % 3, "user": f"u{number * number % 11}"} for number in range(120)
]


def write(path: Path, rows: list[Row]) -> str:
    table = datasets.Dataset.from_list(rows)
    {".jsonl": table.to_json, ".csv": table.to_csv, ".parquet": table.to_parquet}[path.suffix](str(path))
    return str(path)


def local(source: str, **keys: Any) -> DataConfig:
    return DataConfig(source=source, **{"partition": "iid", "natural_field": "user", **keys})
