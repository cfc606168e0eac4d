"""Tables and folders on this machine's disk, made once for a name that tells everything they depend on; tables are read
memory-mapped. What is in them, and what they depend on, is not known here.
"""

import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable
from safetensors import SafetensorError

from spry_app.errors import SpryError, is_disk_full

logger = logging.getLogger(__name__)

LARGE_BYTES = 1 << 20
"""Rows of more than this are not held in memory, where their tokens would come to take a hundred times as much."""
ROWS_AT_ONCE = 1000
BYTES_AT_ONCE = 1 << 20
_TABLE, _FACTS = "table.arrow", "facts.json"
NEW = "new-"
"""How folders begin that go with the process which made them."""
_MIB = 1 << 20
_NO_LIMIT_MIB = 1 << 43
_YOUNG_S = 600.0
"""What was used so recently is not removed: somebody may be about to open it."""
_ABANDONED_S = 86400.0

Facts = dict[str, Any]
Make = Callable[[Facts], Iterator[pa.Table]]
"""Gives the parts of a table, of one schema, and writes what is to be told of it (as JSON has it) into the facts."""


@dataclass(frozen=True)
class Stored:
    """table: its buffers are the file's. again: whether it was made before."""

    table: pa.Table
    facts: Facts
    again: bool


def cache_folder(kind: str = "rows") -> Path:
    """In $SPRY_CACHE, else spry in $XDG_CACHE_HOME or ~/.cache; closed to all but this user. Raises SpryError."""
    own, usual = os.environ.get("SPRY_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(own or Path(usual, "spry")).expanduser().absolute() / kind
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise SpryError(f"Nothing can be kept in {folder} ({error}): set SPRY_CACHE to a folder.") from error
    return folder


@functools.cache
def _of_this_process(folder: Path) -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix=NEW, dir=folder, ignore_cleanup_errors=True)


def folder_for(most_mib: int) -> Path:
    """Where entries are: the cache, or where it may hold nothing a folder that goes with this process."""
    return cache_folder() if most_mib else Path(_of_this_process(cache_folder()).name)


def name_of(kind: str, depends_on: Mapping[str, Any]) -> str:
    """An entry's name."""
    text = json.dumps(depends_on, sort_keys=True, default=str)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def stored(name: str, make: Make, most_mib: int) -> Stored:
    """The table of this name: as it is on disk, or made, if there is none or its bytes are not those that were written.

    most_mib: of all entries; 0 keeps none beyond this process. Raises SpryError where the disk is full.
    """
    root = folder_for(most_mib)
    entry = root / name
    if (found := _read(entry)) is not None:
        return found
    with _locked(root / f"{name}.lock"):
        if (found := _read(entry)) is not None:  # another process was faster
            return found
        with _written_in(root):
            made = _made(entry, make)
    if most_mib:
        tidy(root, most_mib, name)
    return made


def made_once(kind: str, name: str, write: Callable[[Path], None]) -> Path:
    """The folder of this name, beside others of its kind: as it is on disk, or filled by `write`, given an empty one.

    It stays until somebody removes it. Raises SpryError where the disk is full.
    """
    root = cache_folder(kind)
    entry = root / name
    if entry.is_dir():
        return entry
    with _locked(root / f"{name}.lock"):
        if not entry.is_dir():  # no other process was faster
            tidy(root, _NO_LIMIT_MIB)
            with _written_in(root), tempfile.TemporaryDirectory(prefix=NEW, dir=root) as temporary:
                new = Path(temporary, "entry")
                new.mkdir(mode=0o700)
                write(new)
                new.rename(entry)
    return entry


@contextmanager
def _written_in(root: Path) -> Iterator[None]:
    """Raises SpryError where the disk is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_disk_full(error):
            raise SpryError(
                f"The disk of {root} is full ({error}): make room, or set SPRY_CACHE to a folder on another."
            ) from error
        raise


def _made(entry: Path, make: Make) -> Stored:
    with tempfile.TemporaryDirectory(prefix=NEW, dir=entry.parent, ignore_cleanup_errors=True) as temporary:
        new = Path(temporary, "entry")
        new.mkdir(mode=0o700)
        facts: Facts = {}
        _write(new / _TABLE, make(facts))
        (new / _FACTS).write_text(json.dumps({"sha256": digest_of_file(new / _TABLE), "facts": facts}))
        made = Stored(_mapped(new / _TABLE), facts, False)
        shutil.rmtree(entry, ignore_errors=True)  # of what was damaged
        new.rename(entry)
    return made


def _write(path: Path, parts: Iterator[pa.Table]) -> None:
    writer: pa.ipc.RecordBatchStreamWriter | None = None
    with path.open("wb") as file:
        for part in parts:
            writer = writer or pa.ipc.new_stream(file, part.schema)
            writer.write_table(part.combine_chunks())
        writer = writer or pa.ipc.new_stream(file, pa.schema([]))
        writer.close()


def _read(entry: Path) -> Stored | None:
    """None where there is no such entry, or its bytes are not those that were written."""
    try:
        told = json.loads((entry / _FACTS).read_text())
        if digest_of_file(entry / _TABLE) != told["sha256"]:
            raise ValueError("its bytes have changed")
        found = Stored(_mapped(entry / _TABLE), told["facts"], True)
        os.utime(entry / _FACTS)
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:  # ArrowInvalid is a ValueError
        logger.warning("%s is damaged (%s) and is made again.", entry, error)
        return None


def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def digest_of_file(path: Path) -> str:
    """Of its content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Of several processes one makes an entry; the lock goes with the process that holds it."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def tidy(root: Path, most_mib: int, keep: str = "") -> None:
    """Remove what was used longest ago until all entries are of at most so many MiB, `keep` aside; and what processes
    have left that were ended.
    """
    now, entries = time.time(), []
    for folder in (path for path in root.iterdir() if path.is_dir()):
        size, last = _extent(folder)
        if folder.name.startswith(NEW) and now - last > _ABANDONED_S:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            entries.append((last, size, folder))
    total = sum(size for _, size, _ in entries)
    for last, size, folder in sorted(entries):
        if total <= most_mib * _MIB:
            return
        if folder.name != keep and now - last > _YOUNG_S:
            shutil.rmtree(folder, ignore_errors=True)
            (root / f"{folder.name}.lock").unlink(missing_ok=True)
            total -= size


def _extent(folder: Path) -> tuple[int, float]:
    """Bytes, and when something in it was last written or used."""
    size, last = 0, 0.0
    for path in (folder, *folder.rglob("*")):
        try:
            found = path.lstat()
        except OSError:  # removed by another process
            continue
        size, last = size + found.st_blocks * 512, max(last, found.st_mtime)
    return size, last


def rows_of(table: pa.Table) -> Dataset:
    """A table as rows. Left to itself `datasets` names them by all they hold, for which it copies that to memory."""
    return Dataset(InMemoryTable(table), fingerprint=generate_random_fingerprint())


def large(size: int) -> bool:
    """Whether so many bytes of rows are for the disk."""
    return size > LARGE_BYTES


def size_of(rows: Dataset) -> int:
    """Bytes of the rows, about: of a selection its part of those it is from."""
    whole = rows.data
    return int(whole.nbytes * len(rows) / max(1, whole.num_rows))


def digest_of(rows: Dataset) -> str:
    """Of the content of rows and the order they are in, wherever they come from."""
    found = hashlib.sha256(f"{rows.features} {rows.data.schema.remove_metadata()}".encode())
    for batch in rows.data.to_batches(ROWS_AT_ONCE):
        found.update(batch.serialize())
    if rows._indices is not None:
        for chunk in rows._indices.column(0).chunks:
            found.update(chunk.to_numpy())
    return found.hexdigest()


@functools.cache
def digest_of_code(folder: Path) -> str:
    """Of the Python files of a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def parts_of(rows: Dataset) -> Iterator[tuple[int, Dataset]]:
    """(number of the first row, rows) of parts that together are all rows, each of about a MiB."""
    step = max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE * len(rows) // max(1, size_of(rows))))
    for start in range(0, len(rows), step):
        yield start, rows.select(range(start, min(start + step, len(rows))))
