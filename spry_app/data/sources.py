"""Where rows come from: the embedded set, local files, the Hub. What their columns mean is decided in corpus.py."""

import logging
from collections.abc import Callable
from pathlib import Path

import pandas
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetsError

from spry_app.config import DataConfig
from spry_app.data import household
from spry_app.errors import SpryError

_log = logging.getLogger(__name__)

_HUB_TEST_SPLITS = ("test", "validation")
_UNREADABLE = (OSError, ValueError, RuntimeError, StopIteration, DatasetsError)
"""What `datasets` raises for a source that is absent, unreachable, misnamed or malformed."""


def _csv(path: str) -> Dataset:
    # Not the builder of `datasets`: it leaves the file open. Of all cells only an empty one is missing, since "NA" or
    # "null" may well be what somebody said.
    return Dataset.from_pandas(pandas.read_csv(path, keep_default_na=False, na_values=[""]), preserve_index=False)


def _json(path: str) -> Dataset:
    return load_dataset("json", data_files=path, split="train")


def _parquet(path: str) -> Dataset:
    return load_dataset("parquet", data_files=path, split="train")


_READERS: dict[str, Callable[[str], Dataset]] = {".jsonl": _json, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _household() -> tuple[Dataset, Dataset]:
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=list(household.INTENTS)), "household": Value("string")}
    )
    train, test = (Dataset.from_list([vars(row) for row in rows], features=features) for rows in household.utterances())
    return train, test


EMBEDDED: dict[str, Callable[[], tuple[Dataset, Dataset]]] = {"household": _household}
"""Name -> training and test rows."""


def read_train(config: DataConfig) -> Dataset:
    """Rows of `data.source`, columns as they come, those within others by their path ("answers.text")."""
    if config.source in EMBEDDED:
        return EMBEDDED[config.source]()[0]
    if _names_file(config.source):
        return read_file(config.source, "data.source")
    return _read_hub(config, config.train_split)


def read_test(config: DataConfig) -> Dataset | None:
    """Rows of the central test set, as `read_train` has them; None where there is none."""
    if _names_file(config.test):
        return read_file(config.test, "data.test")
    if config.source in EMBEDDED or _names_file(config.source):
        if config.test:
            raise SpryError(
                f"data.test is {config.test!r}, but data.source {config.source!r} has no such split. Set data.test to "
                f"a file ending in {', '.join(_READERS)}, or leave it empty."
            )
        return EMBEDDED[config.source]()[1] if config.source in EMBEDDED else None
    return _read_hub(config, config.test) if config.test else _hub_test(config)


def require_file(path: str, key: str) -> Path:
    """A local file that is there, not empty and of a kind that is read; `key` is the setting that named it."""
    found = Path(path).expanduser()
    if not found.is_file():
        raise SpryError(f"{key} is {path!r}, but there is no file {found.absolute()}. Give an absolute path.")
    if not _names_file(path):
        raise SpryError(f"{key} is {path!r}; a file must end in {', '.join(_READERS)}.")
    if found.stat().st_size == 0:
        raise SpryError(f"{key} is {path!r}, which is empty; it needs at least one row.")
    return found


def read_file(path: str, key: str) -> Dataset:
    """Rows of a local file; see require_file."""
    found = require_file(path, key)
    ending = found.suffix.lower()
    try:
        return _READERS[ending](str(found)).flatten()
    except _UNREADABLE as error:
        reason = "it has no rows" if "corresponds to no data" in str(error) else error.__cause__ or error
        raise SpryError(f"{key} is {path!r}, which cannot be read as {ending}: {reason}.") from error


def _names_file(name: str) -> bool:
    return Path(name).suffix.lower() in _READERS


def _read_hub(config: DataConfig, split: str) -> Dataset:
    try:
        return load_dataset(config.source, config.config or None, split=split).flatten()
    except _UNREADABLE as error:
        reason = str(error).rstrip(".")
        raise SpryError(
            f"data.source {config.source!r} (data.config {config.config!r}, split {split!r}) cannot be loaded: "
            f"{reason}. It is neither embedded ({', '.join(EMBEDDED)}) nor a file ({', '.join(_READERS)}), so it was "
            "looked up on the Hub; check data.source, data.config, data.train-split, data.test and the network."
        ) from error


def _hub_test(config: DataConfig) -> Dataset | None:
    """The first split that is there and has labels: many a public test split hides them as -1."""
    for split in _HUB_TEST_SPLITS:
        try:
            rows = load_dataset(config.source, config.config or None, split=split).flatten()
        except ValueError:
            continue
        if config.label_field not in rows.column_names or -1 not in rows.unique(config.label_field):
            return rows
    _log.warning("%s has no labelled split of %s: no central test set.", config.source, " or ".join(_HUB_TEST_SPLITS))
    return None
