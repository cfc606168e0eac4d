"""What a run has left as one page for people: curves, clients, costs, failures, configuration. Computes nothing about
learning, and needs neither torch nor Flower.
"""

from collections.abc import Sequence
from pathlib import Path

from spry_app.errors import SpryError
from spry_app.report.comparison import comparison_of
from spry_app.report.folder import read_run
from spry_app.report.page import page_of
from spry_app.report.templates import html

REPORT = "report.html"


def render(folders: Sequence[Path], target: float | None = None) -> str:
    """HTML of one run, or of several side by side. Raises SpryError where a folder is not one of a run."""
    runs = [read_run(folder) for folder in folders]
    try:
        return html(page_of(runs[0]) if len(runs) == 1 else comparison_of(runs, target))
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        names = ", ".join(map(str, folders))
        raise SpryError(f"The files in {names} are not as a run of Spry leaves them ({error!r}).") from error


__all__ = ["REPORT", "render"]
