"""Reading what other processes write: growing files, and the line of a log that says what went wrong. Writes none."""

import re
from collections.abc import Iterator
from pathlib import Path

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"^[\w.]+(?:Error|Exception): (.+)$", re.MULTILINE)
_SAYS_LITTLE = ("", "N/A", "An error was encountered. Ending simulation.", "Task failed with unknown error.")


class Tail:
    """The lines of a growing text file, each once; a last line without its end is left for later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0

    def new_lines(self) -> Iterator[str]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            # A run that is resumed cuts off what will be written again.
            self._read = min(self._read, self._path.stat().st_size)
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                yield plain(line.decode(errors="replace").rstrip())


def cause(details: str, log: Path) -> str:
    """What ended a run, in the words of the exception: Flower's status details, else the first of the last traceback.

    In a chain of tracebacks the first is the one that the others came from.
    """
    message = re.sub(r"^\w+ failed with exception: ", "", details).strip()
    if message not in _SAYS_LITTLE:
        return message
    raised = _RAISED.search(read(log).rpartition("raised an exception")[2])
    return raised[1].strip() if raised else last_lines(log) or message


def read(path: Path) -> str:
    """The whole file without terminal colours; empty when there is none."""
    return plain(path.read_text(errors="replace")) if path.exists() else ""


def last_lines(path: Path, count: int = 10) -> str:
    return "\n".join(read(path).rstrip().splitlines()[-count:])


def plain(text: str) -> str:
    """Without terminal colours."""
    return _COLOURS.sub("", text)
