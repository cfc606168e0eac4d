"""Where rows come from: the embedded set, local files, the Hub. What their columns mean is decided in corpus.py."""

import functools
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pandas
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetsError
from pandas.api.types import infer_dtype

from spry_app.config import DataConfig
from spry_app.data import household
from spry_app.errors import SpryError
from spry_app.offline import advice
from spry_app.stored import NEW, Facts, digest_of_file, folder_for, large, name_of, rows_of, stored

_log = logging.getLogger(__name__)

_HUB_TEST_SPLITS = ("test", "validation")
_UNREADABLE = (OSError, ValueError, RuntimeError, StopIteration, DatasetsError)
"""What `datasets` raises for a source that is absent, unreachable, misnamed or malformed."""
_CELLS = 10_000
"""Rows of a large table of text that are read at once."""


def _csv(path: Path, cache_mib: int) -> Dataset:
    # Not the builder of `datasets`: it leaves the file open. Of all cells only an empty one is missing, since "NA" or
    # "null" may well be what somebody said.
    read = functools.partial(pandas.read_csv, path, keep_default_na=False, na_values=[""])
    if not large(path.stat().st_size):
        return Dataset.from_pandas(read(), preserve_index=False)

    def parts(_facts: Facts) -> Iterator[pa.Table]:
        kinds = _kinds(read(chunksize=_CELLS))
        schema: pa.Schema | None = None
        for part in read(chunksize=_CELLS, dtype=kinds):
            table = pa.Table.from_pandas(part, schema=schema, preserve_index=False)
            schema = schema or table.schema
            yield table.replace_schema_metadata(None)

    name = name_of("csv", {"file": digest_of_file(path), "pandas": pandas.__version__})
    return rows_of(stored(name, parts, cache_mib).table)


def _kinds(parts: Iterable[pandas.DataFrame]) -> dict[str, str]:
    """The type of each column in which all of its cells have room, as if they were read at once."""
    found: dict[str, set[str]] = {}
    for part in parts:
        for name, cells in part.items():
            known = cells.dropna()
            kinds = {infer_dtype(known)} if len(known) else set()
            found.setdefault(str(name), set()).update(kinds, {"missing"} if len(known) < len(cells) else ())
    return {name: next((kind for holds, kind in _ROOM if kinds <= holds), "str") for name, kinds in found.items()}


_ROOM = (
    (frozenset({"integer"}), "int64"),
    (frozenset({"integer", "floating", "missing"}), "float64"),
    (frozenset({"boolean", "missing"}), "boolean"),
)
"""Kinds of cells, and the type that holds them; text holds all others."""


def _built(kind: str) -> Callable[[Path, int], Dataset]:
    """By a builder of `datasets`, which reads a part at a time. Its own cache is not used: that looks at a file's time,
    not at what is in it, nor at whether it is whole itself.
    """

    def read(path: Path, cache_mib: int) -> Dataset:
        if not large(path.stat().st_size):
            with _built_rows(kind, path, cache_mib, in_memory=True) as rows:
                return rows

        def parts(_facts: Facts) -> Iterator[pa.Table]:
            with _built_rows(kind, path, cache_mib, in_memory=False) as rows:
                for batch in rows.data.to_batches():
                    yield pa.Table.from_batches([batch], rows.data.schema)

        name = name_of(kind, {"file": digest_of_file(path), "datasets": datasets.__version__})
        return rows_of(stored(name, parts, cache_mib).table)

    return read


@contextmanager
def _built_rows(kind: str, path: Path, cache_mib: int, in_memory: bool) -> Iterator[Dataset]:
    shown = datasets.utils.logging.is_progress_bar_enabled()
    with tempfile.TemporaryDirectory(prefix=NEW, dir=folder_for(cache_mib), ignore_cleanup_errors=True) as folder:
        datasets.disable_progress_bars()
        try:
            yield load_dataset(kind, data_files=str(path), split="train", cache_dir=folder, keep_in_memory=in_memory)
        finally:
            if shown:
                datasets.enable_progress_bars()


_READERS: dict[str, Callable[[Path, int], Dataset]] = {
    ".jsonl": _built("json"),
    ".json": _built("json"),
    ".csv": _csv,
    ".parquet": _built("parquet"),
}
"""Ending -> how a file is read; the number is of MiB that the cache may hold."""


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
        return read_file(config.source, "data.source", config.cache_mib)
    return _read_hub(config, config.train_split)


def read_test(config: DataConfig) -> Dataset | None:
    """Rows of the central test set, as `read_train` has them; None where there is none."""
    if _names_file(config.test):
        return read_file(config.test, "data.test", config.cache_mib)
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


def read_file(path: str, key: str, cache_mib: int) -> Dataset:
    """Rows of a local file; see require_file. cache_mib: what rows and tokens may take on disk."""
    found = require_file(path, key)
    ending = found.suffix.lower()
    try:
        return _READERS[ending](found, cache_mib).flatten()
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
            f"{advice(_download(config))}"
        ) from error


def _download(config: DataConfig) -> str:
    names = ", ".join(map(repr, filter(None, (config.source, config.config))))
    return f'python -c "from datasets import load_dataset; load_dataset({names})"'


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
