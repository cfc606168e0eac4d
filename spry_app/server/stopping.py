"""Whether a run has spent what its config allows or learned what it asks; the end of a round that may be its last."""

from collections.abc import Callable
from logging import INFO

from flwr.app import ArrayRecord
from flwr.common.logger import log

from spry_app.config import RunConfig, StopConfig
from spry_app.protocol import Score
from spry_app.server.record import Recorder, Round

LIMITS: dict[str, tuple[Callable[[StopConfig], float], Callable[[Round], float | None]]] = {
    "target-accuracy": (lambda stop: stop.target_accuracy, lambda now: now.main),
    "max-mib-up": (lambda stop: stop.max_mib_up, lambda now: now.mib_up),
    "max-mib-down": (lambda stop: stop.max_mib_down, lambda now: now.mib_down),
    "max-forwards": (lambda stop: stop.max_forwards, lambda now: now.forwards),
    "max-seconds": (lambda stop: stop.max_seconds, lambda now: now.seconds),
}
"""Key of the run config's section `stop` -> its value (0: no limit), and what of the round may reach it."""


class Stopped(Exception):
    """Ends the rounds from within: Flower's loop has no other way out. `arrays` are those of the last round."""

    def __init__(self, reason: str, arrays: ArrayRecord) -> None:
        super().__init__(reason)
        self.arrays = arrays


def reached(stop: StopConfig, now: Round) -> str:
    """The first limit that is reached, as a sentence; empty if none is."""
    for key, (limit, spent) in LIMITS.items():
        most, value = limit(stop), spent(now)
        if most and value is not None and value >= most:
            return f"{key} {most:g} reached in round {now.round}"
    return ""


def decide(config: RunConfig, recorder: Recorder) -> bool:
    """Whether the current round is the last for what has been spent so far; once decided it stays so."""
    recorder.stopped = recorder.stopped or reached(config.stop, recorder.measured())
    return bool(recorder.stopped)


def end_round(
    config: RunConfig, recorder: Recorder, arrays: ArrayRecord, score: Callable[[], Score] | None
) -> Score | None:
    """Evaluate where it is due, write the round down, and raise Stopped where it was the last before its time.

    score: of the global model on the server's test set; None where there is none, and clients have scored it (or not:
    a round that they did not evaluate cannot become the last any more).
    """
    round_ = recorder.current.round
    if score is not None:
        decide(config, recorder)
    due = config.evaluates(round_) or bool(recorder.stopped)
    result = score() if due and score is not None else None
    recorder.end(result)
    if due and decide(config, recorder):
        log(INFO, "The run ends: %s", recorder.stopped)
        raise Stopped(recorder.stopped, arrays)
    return result
