"""Where a run's numbers go beside its folder: opened before anything is loaded, told every round, never what ends it.
The places themselves are in sinks.py.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.common.logger import log

from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.plugins import look_up
from spry_app.server.sinks import SINKS, Sink


class Telemetry:
    """Sinks by their names in `telemetry.sinks`. One that raises is left out from then on."""

    def __init__(self, sinks: Mapping[str, Sink] | None = None) -> None:
        self.sinks = dict(sinks or {})

    def round(self, line: Mapping[str, Any]) -> list[str]:
        """Tell all of a line of metrics.jsonl; returns a sentence for each that could not take it."""
        values, lost = numbers(line), []
        for name, sink in list(self.sinks.items()):
            try:
                sink.round(int(line["round"]), values)
            except Exception as error:  # other people's code and network: no reason to end a run
                _end(name, self.sinks.pop(name), completed=False)
                lost.append(f"telemetry.sinks: {name!r} is left out from round {line['round']} on: {error!r}")
        return lost

    def end(self, completed: bool) -> None:
        """Tell all that there are no more rounds."""
        for name, sink in self.sinks.items():
            _end(name, sink, completed)


@contextmanager
def opened(config: RunConfig, folder: Path) -> Iterator[Telemetry]:
    """The sinks of a run, told its configuration. Raises SpryError where one is not known, not installed, or cannot
    begin.
    """
    telemetry, completed = Telemetry(), False
    try:
        for name in dict.fromkeys(filter(None, map(str.strip, config.telemetry.sinks.split(",")))):
            telemetry.sinks[name] = _open(name, folder, config)
            log(INFO, "Telemetry goes to %s", name)
        yield telemetry
        completed = True
    finally:
        telemetry.end(completed)


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """What a line of metrics.jsonl has of numbers, those of its noise by dotted names; not those of each unit."""
    flat = dict(line)
    for name, value in line.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": number for inner, number in value.items()}
    return {
        name: float(value)
        for name, value in flat.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in ("round", "rounds")
    }


def _end(name: str, sink: Sink, completed: bool) -> None:
    try:
        sink.end(completed)
    except Exception as error:
        log(WARNING, "telemetry.sinks: %r could not end well: %r", name, error)


def _open(name: str, folder: Path, config: RunConfig) -> Sink:
    make = look_up(name, SINKS, "telemetry.sinks")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        sink = make(folder, config.flat())
    except ImportError as error:
        install = f": pip install 'spry[{name}]'" if name in SINKS else ""
        raise SpryError(f"telemetry.sinks has {name!r}, which cannot be imported here ({error}){install}") from error
    except Exception as error:
        raise SpryError(f"telemetry.sinks: {name!r} cannot begin ({error!r}). Mend it, or leave it out.") from error
    if not isinstance(sink, Sink):
        raise SpryError(
            f"telemetry.sinks: {name!r} gave a {type(sink).__name__}, without the methods `round` and `end`."
        )
    return sink
