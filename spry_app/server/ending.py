"""The end of a run, however it ends: why it failed is kept, and its report is made. Decides nothing about rounds."""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import WARNING
from pathlib import Path

from flwr.common.logger import log

from spry_app.atomic import write_whole
from spry_app.report import REPORT, render
from spry_app.server.roster import failed


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Around a run. One that ended before it left anything in its folder has no report."""
    try:
        yield
    except Exception as error:
        failed(folder, f"{error}")
        raise
    finally:
        if (folder / "config.json").exists():
            _report(folder)


def _report(folder: Path) -> None:
    try:
        write_whole(folder / REPORT, render([folder]))
    except Exception as error:  # a run is not lost for its picture
        log(WARNING, "No report of this run could be made: %s", error)
