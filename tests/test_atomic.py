"""A file is the old one or the new one, whole."""

from pathlib import Path

import pytest

from spry_app.atomic import write_whole


def test_a_file_that_cannot_be_replaced_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_whole(path, "old\n")
    (tmp_path / "run.new").mkdir()  # stands for a disk without room
    with pytest.raises(OSError):
        write_whole(path, "new\n")
    assert path.read_text() == "old\n"


def test_whoever_has_the_old_file_open_reads_it_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_whole(path, "old\n" * 3)
    with path.open() as reading:
        first = reading.readline()
        write_whole(path, "new\n")
        assert first + reading.read() == "old\n" * 3
    assert path.read_text() == "new\n" and list(tmp_path.iterdir()) == [path]
