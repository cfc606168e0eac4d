"""`spry run`: one federated run on this machine, from checked configuration to exit status. Nothing is left running."""

import json
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from rich.console import Console

from spry_app.atomic import write_whole
from spry_app.config import Scalar
from spry_app.errors import SpryError
from spry_app.launcher.logs import Tail, cause
from spry_app.launcher.processes import Processes
from spry_app.launcher.progress import RoundDisplay, summary
from spry_app.launcher.settings import Simulation, federation_config, keep_launch, run_config
from spry_app.launcher.superlink import Outcome, SuperLink, environment

_LONGEST_TEMPORARY = 20
"""Characters: behind them come Ray's 68 and our 13, and a Unix socket's path has 103 at most (macOS)."""


class Stopped(BaseException):
    """A signal asked us to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


def run(simulation: Simulation, console: Console) -> int:
    """Exit status: 0 only if the run completed, else 1; 130 after Ctrl-C. Raises SpryError before anything starts."""
    settings, federation = run_config(simulation), federation_config(simulation)
    folder = Path(tempfile.mkdtemp(prefix="spry-", dir=_temporary()))
    try:
        with _signals_raise():
            return _run(simulation, settings, federation, folder, console)
    except Stopped as stop:
        console.print(f"Stopped ({stop}). Nothing is left running.")
        return stop.exit_status
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(
    simulation: Simulation,
    settings: dict[str, Scalar],
    federation: dict[str, Scalar],
    folder: Path,
    console: Console,
) -> int:
    logs, neutral = folder / "logs", folder / "empty"
    logs.mkdir()
    neutral.mkdir()
    outputs = Path(str(settings["output-dir"]))
    result_folder = outputs / "not-started"
    try:
        with Processes(environment(folder), neutral) as processes:
            superlink = SuperLink(processes, logs)
            superlink.start("--simulation")
            run_id = superlink.submit(simulation.app, settings, federation)
            result_folder = Path(str(settings.get("resume", "") or outputs / run_id))
            keep_launch(simulation, result_folder)
            outcome = _watch(simulation, superlink, run_id, result_folder, logs / "run.log", console)
        if not outcome.completed:
            raise SpryError(f"The run failed: {cause(outcome.details, logs / 'run.log')}")
    except SpryError as error:
        kept = shutil.copytree(logs, result_folder / "logs", dirs_exist_ok=True)
        Console(stderr=True).print(f"{error}\nLogs: {kept}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    finally:
        _report(result_folder)
    result = result_folder / "result.json"
    if result.exists():
        console.print(summary(json.loads(result.read_text()), Path.cwd()))
    return 0


def _report(folder: Path) -> None:
    """Of a run that was ended before it could make its own."""
    from spry_app.report import REPORT, render  # takes seconds, which most runs need not wait for

    metrics, report = folder / "metrics.jsonl", folder / REPORT
    if metrics.exists() and (not report.exists() or report.stat().st_mtime < metrics.stat().st_mtime):
        with suppress(SpryError, OSError):
            write_whole(report, render([folder]))


def _watch(
    simulation: Simulation, superlink: SuperLink, run_id: str, folder: Path, log: Path, console: Console
) -> Outcome:
    metrics, told = Tail(folder / "metrics.jsonl"), Tail(log)
    with RoundDisplay(console, simulation.nodes) as display:

        def look() -> None:
            for line in told.new_lines():
                if simulation.verbose:
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
                else:
                    display.note(line)
            for line in metrics.new_lines():
                display.show(json.loads(line))

        return superlink.follow(run_id, log, look)


def _temporary() -> str:
    directory = tempfile.gettempdir()
    return directory if len(directory) <= _LONGEST_TEMPORARY else "/tmp"


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn the signals that end a program into Stopped, so that every `with` above runs to its end."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
