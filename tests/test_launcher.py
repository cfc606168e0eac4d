"""`spry run` around an app without a model: true exit status, plain words, nothing left running, whatever happens.
A run that completes is in test_end_to_end.
"""

import contextlib
import logging
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from left_running import left_running
from rich.console import Console

from spry_app.launcher.logs import Tail, cause
from spry_app.launcher.processes import Processes
from spry_app.launcher.progress import RoundDisplay, describe
from spry_app.server import held_out

ROOT = Path(__file__).parent.parent
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory with a short name: Ray puts sockets below it."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def start(tmp_path: Path, temporary: Path) -> Start:
    """Start `spry run` on the tiny app, in a directory of its own."""
    app = tmp_path / "app"
    shutil.copytree(ROOT / "tests" / "tiny_app", app)
    settings = (ROOT / "pyproject.toml").read_text()
    # Flower refuses a pattern that nothing matches, and this app has no room `spry_app`.
    (app / "pyproject.toml").write_text(re.sub(r"^fab-include = .*\n", "", settings, flags=re.M))

    def start(run_config: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "spry_app.cli", "run", str(app), "--nodes", "3", "--run-config", run_config]
        environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "10.0.0.1:6379"}
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return start


def nothing_left(temporary: Path) -> bool:
    return left_running(temporary) == [] and list(temporary.iterdir()) == []


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_a_failed_run_says_why_and_exits_with_1(start: Start, temporary: Path, tmp_path: Path) -> None:
    process = start('num-server-rounds=2 method="raise"')
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.startswith("The run failed: data.label-field is 'mood', and no row has it.\nLogs: ")
    (logs,) = (tmp_path / "outputs").glob("*/logs")
    assert "Traceback" in (logs / "run.log").read_text()
    assert nothing_left(temporary)


def test_ctrl_c_stops_everything_and_exits_with_130(start: Start, temporary: Path, tmp_path: Path) -> None:
    process = start('num-server-rounds=2 method="hang"')
    until(lambda: bool(list((tmp_path / "outputs").glob("*/metrics.jsonl"))))
    assert any("raylet" in command for command in left_running(temporary))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Stopped (SIGINT)" in output
    (report,) = (tmp_path / "outputs").glob("*/report.html")
    assert "it is still going, or was ended from outside" in report.read_text()
    assert nothing_left(temporary)


def test_a_termination_while_flower_starts_leaves_nothing(start: Start, temporary: Path) -> None:
    process = start("num-server-rounds=2")
    until(lambda: any("flower-superlink" in command for command in left_running(temporary)))
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert nothing_left(temporary)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(os.environ | {"TMPDIR": str(tmp_path)}, tmp_path) as processes:
        yield processes


def test_a_descendant_that_detached_and_lost_its_parent_is_stopped(processes: Processes, tmp_path: Path) -> None:
    detach = "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True).wait()"
    child = processes.start([sys.executable, "-c", detach], tmp_path / "log")
    until(lambda: "sleep 600" in left_running(tmp_path))
    processes.note_descendants()
    child.kill()
    child.wait()
    assert left_running(tmp_path) == ["sleep 600"]
    processes.stop()
    assert left_running(tmp_path) == []


def test_a_process_that_ignores_the_request_to_end_is_made_to(processes: Processes, tmp_path: Path) -> None:
    processes.start(["bash", "-c", "trap '' TERM; while true; do sleep 0.1; done"], tmp_path / "log")
    until(lambda: any("trap" in command for command in left_running(tmp_path)))
    processes.stop(patience_s=0.5)
    assert left_running(tmp_path) == []


def test_a_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert list(tail.new_lines()) == []
    path.write_text("one\ntw")
    assert list(tail.new_lines()) == ["one"]
    with path.open("a") as file:
        file.write("o\nthree\n")
    assert list(tail.new_lines()) == ["two", "three"]
    assert list(tail.new_lines()) == []


def test_the_cause_is_the_first_exception_of_the_chain_where_flower_says_little(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text(
        "ValueError: an earlier one that the run survived\n"
        "\x1b[91mERROR \x1b[0m: Simulation raised an exception\nTraceback ...\nValueError: ActorPool is empty.\n\n"
        "The above exception was the direct cause of the following exception:\n\nRuntimeError: Runtime crashed.\n"
    )
    assert cause("An error was encountered. Ending simulation.", log) == "ActorPool is empty."
    assert cause("Simulation failed with exception: no such file", log) == "no such file"
    assert cause("N/A", tmp_path / "none.log") == "N/A"


def test_the_time_left_follows_the_pace_since_the_first_round() -> None:
    row = {"loss": None, "train-loss": 0.7, "accuracy": 0.5, "asked": 4, "answered": 3, "refused": 1}
    row |= {"mib-up": 0.25, "mib-down": 1.0}
    first = row | {"round": 1, "rounds": 10, "seconds": 30.0}
    fourth = row | {"round": 4, "rounds": 10, "seconds": 60.0}  # 10 s a round since the first; 6 rounds are left
    shown = "loss 0.700  accuracy 50.0%  3 of 4 devices answered  1 refused  sent 1.25 MiB"
    assert describe(first, first) == shown
    assert describe(fourth, first) == f"{shown}  1:00 left"
    other = {"accuracy": None, "main-metric": "f1", "metrics": {"f1": 0.25, "exact-match": 0.125}}
    assert "loss 0.700  f1 25.0%  3 of 4" in describe(first | other, first)
    assert "accuracy 50.0%  epsilon 2.35  3 of 4" in describe(first | {"epsilon": 2.349}, first)


ROW = {"round": 1, "rounds": 1, "loss": 0.5, "accuracy": None, "asked": 1, "answered": 1, "refused": 0}
ROW |= {"mib-up": 0.0, "mib-down": 0.0, "seconds": 1.0}
PLAIN = "Starting 3 devices\nRound 1/1  loss 0.500  sent 0.00 MiB\n"


def shown(console: Console) -> None:
    with RoundDisplay(console, nodes=3) as display:
        display.show(ROW)


@pytest.mark.parametrize("force_color", ["", "1"])
def test_a_file_gets_a_plain_line_a_round_whatever_colours_a_ci_asks_for(
    force_color: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", force_color)
    shown(Console(width=100))
    assert capsys.readouterr().out == PLAIN


def test_a_long_evaluation_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words of the server's own log; of its other lines nothing is shown."""
    with caplog.at_level(logging.INFO, logger="flwr"):
        told = held_out.Progress(2500)
        told(1000)  # within a moment
        monkeypatch.setattr(held_out, "EVERY_S", 0.0)
        told(500)
    assert caplog.messages == ["Scored 1,500 of 2,500 rows"]
    with RoundDisplay(Console(width=100), nodes=3) as display:
        display.note("INFO :      Starting SpryStrategy strategy:")
        display.note(f"INFO :      {caplog.messages[0]}")
        display.show(ROW)
    first, *others = PLAIN.splitlines(keepends=True)
    assert capsys.readouterr().out == "".join([first, "Scored 1,500 of 2,500 rows\n", *others])


@pytest.mark.parametrize(
    ("environment", "live"),
    [
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "xterm-color", "JPY_PARENT_PID": "7"}, False),
    ],
    ids=["over-ssh", "dumb", "shell-line-of-a-notebook"],
)
def test_a_terminal_gets_one_live_line_unless_whoever_shows_it_cannot_go_back_in_it(
    environment: dict[str, str], live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terminals with what the environment says of them: of ssh, of Emacs, of `!spry run` in a notebook, whose kernel
    has the variable that Jupyter starts it with.
    """
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR", "JPY_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        shown(Console(file=terminal, width=80))
    written = b""
    with contextlib.suppress(OSError):  # what Linux says at the end of a terminal that was closed
        while part := os.read(ours, 4096):
            written += part
    os.close(ours)
    assert ("\x1b[2K" in written.decode()) is live
    assert (written.decode().replace("\r\n", "\n") == PLAIN) is not live
    assert "Round 1/1" in written.decode()


def test_in_a_notebook_each_line_is_shown_once_and_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich's way into a notebook, which is IPython's display; in its place here a list, as IPython is not installed."""
    found: list[dict[str, str]] = []
    display = types.ModuleType("IPython.display")
    display.display = lambda shown: found.append(shown._repr_mimebundle_(include=[], exclude=[]))  # type: ignore
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    shown(Console(force_jupyter=True, width=100))
    assert [bundle["text/plain"] for bundle in found] == PLAIN.splitlines(keepends=True)
    assert not any("\x1b" in bundle["text/html"] for bundle in found)
