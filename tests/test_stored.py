"""Entries on disk: made once by one process, made again where they are damaged, gone where there are too many."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from processes import ROOT, at_once
from safetensors import SafetensorError

from spry_app import stored as store
from spry_app.errors import SpryError


def table_of(rows: int) -> store.Make:
    def make(facts: store.Facts) -> Iterator[pa.Table]:
        facts["rows"] = rows
        for start in range(0, rows, 10):
            yield pa.table({"x": list(range(start, start + 10))})

    return make


@pytest.mark.parametrize(
    "harm",
    [
        lambda entry: (entry / "table.arrow").write_bytes((entry / "table.arrow").read_bytes()[:-40]),
        lambda entry: (entry / "table.arrow").write_bytes(
            (entry / "table.arrow").read_bytes().replace(b"\x09\0\0\0\0\0\0\0", b"\x08\0\0\0\0\0\0\0")
        ),
        lambda entry: (entry / "table.arrow").unlink(),
        lambda entry: (entry / "facts.json").unlink(),
        lambda entry: (entry / "facts.json").write_text('{"sha256"'),
        lambda entry: (entry / "facts.json").write_text("[]"),
    ],
    ids=["cut", "another number", "no table", "no facts", "half of the facts", "other facts"],
)
def test_a_damaged_entry_is_made_again(harm: Any, cache: Path) -> None:
    whole = list(range(100))
    first = store.stored("x-1", table_of(100), 10)
    assert not first.again and store.stored("x-1", table_of(100), 10).again
    harm(cache / "x-1")
    mended = store.stored("x-1", table_of(100), 10)
    assert not mended.again and mended.table["x"].to_pylist() == whole and mended.facts == {"rows": 100}
    assert store.stored("x-1", table_of(100), 10).again


def test_an_entry_that_could_not_be_finished_is_not_there(cache: Path) -> None:
    def make(_facts: store.Facts) -> Any:
        yield pa.table({"x": [1]})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.stored("x-1", make, 10)
    assert [path.name for path in cache.iterdir()] == ["x-1.lock"]
    assert store.stored("x-1", table_of(10), 10).table["x"].to_pylist() == list(range(10))


_SLOWLY = """
import sys, time
import pyarrow as pa
from spry_app.stored import stored

def make(facts):
    for start in range(0, 50, 10):
        time.sleep(0.1)
        yield pa.table({"x": list(range(start, start + 10))})

sys.stdin.readline()
found = stored(sys.argv[1], make, int(sys.argv[2]))
print(found.again, found.table["x"].to_pylist() == list(range(50)))
"""


def test_of_processes_that_want_the_same_entry_one_makes_it(cache: Path) -> None:
    command = [sys.executable, "-c", _SLOWLY, "x-1", "10"]
    found = [said.split() for said in at_once(command)]
    assert sorted(found) == [["False", "True"], ["True", "True"], ["True", "True"]]


def test_of_those_who_want_the_same_folder_one_fills_it_and_a_failure_leaves_none(cache: Path) -> None:
    calls: list[int] = []

    def write(folder: Path) -> None:
        calls.append(1)
        time.sleep(0.1)
        (folder / "x").write_text("whole")
        if len(calls) == 1:
            raise ValueError("the first one fails")

    with pytest.raises(ValueError, match="the first one fails"):
        store.made_once("models", "x-1", write)
    with ThreadPoolExecutor(4) as pool:
        (found,) = set(pool.map(lambda _: store.made_once("models", "x-1", write), range(4)))
    assert found == cache.parent / "models" / "x-1" and (found / "x").read_text() == "whole" and len(calls) == 2
    assert sorted(path.name for path in found.parent.iterdir()) == ["x-1", "x-1.lock"]
    assert {path.stat().st_mode & 0o777 for path in (found, found.parent)} == {0o700}


def test_a_full_disk_is_told_of_a_folder_too(cache: Path) -> None:
    def write(folder: Path) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")

    with pytest.raises(SpryError, match=r"The disk of .*models is full .* set SPRY_CACHE"):
        store.made_once("models", "x-1", write)


def test_without_a_cache_nothing_is_left(cache: Path) -> None:
    command = [sys.executable, "-c", _SLOWLY, "x-1", "0"]
    done = subprocess.run(command, cwd=ROOT, input="\n", capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["False", "True"], done.stderr
    assert cache.is_dir() and not list(cache.iterdir())


def test_past_its_size_the_cache_loses_what_was_used_longest_ago(cache: Path) -> None:
    def big_table(_facts: store.Facts) -> Any:
        yield pa.table({"x": [os.urandom(400_000)]})

    now = time.time()
    for name, age in (("x-old", 4000), ("x-older", 9000), ("x-used", 8000), ("x-young", 5)):
        store.stored(name, big_table, 10)
        for path in (cache / name, *(cache / name).iterdir()):
            os.utime(path, (now - age, now - age))
    assert store.stored("x-used", big_table, 10).again  # which counts as use
    held = store.stored("x-older", big_table, 10)
    for path in (cache / "x-older", *(cache / "x-older").iterdir()):
        os.utime(path, (now - 9000, now - 9000))
    left = cache / "new-abandoned"
    left.mkdir()
    os.utime(left, (now - 90_000, now - 90_000))
    store.stored("x-new", big_table, 1)
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {"x-new", "x-used", "x-young"}
    assert len(held.table["x"][0].as_py()) == 400_000  # who has it open keeps it
