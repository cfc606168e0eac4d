"""What a run writes down: metrics.jsonl, a line a round, and one line in the log. Computes nothing about learning."""

import functools
import json
import operator
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from logging import INFO, WARNING
from pathlib import Path
from typing import Any, Self

from flwr.common.logger import log

from spry_app.atomic import write_whole
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import Method
from spry_app.protocol import Introduction, Score, Task, Tensors, TrainReply, said
from spry_app.server.roster import Roster
from spry_app.server.telemetry import Telemetry
from spry_app.slope_log import Entry, SlopeLog, read
from spry_app.tasks import get_task

MIB = 2**20


@dataclass
class Round:
    """One line of metrics.jsonl. None: not measured in this round.

    loss, metrics: of the global model on rows that no client trained on (generalised), all that its task has; accuracy:
    the one of that name. main_metric: which of them is looked at first. train_loss: mean over the clients' batches.
    personalised, personalised_accuracy: of clients after their local training, on their held-out rows. mib_up,
    mib_down: since the start, as serialised. forwards: what the replies that were used took of their clients since the
    start, in passes of one example through the model (autodiff.costs); evaluation is not counted. seconds: since the
    start. client_seconds: of the slowest client. peak_mib: of the first step of one client, a different one each time.
    asked, answered, refused: clients; refused replies were not used. clipped: replies that asked for more than a client
    may (clipping.py), and were used as far as it may. partial: replies of part of their local steps
    (`client.deadline-s`, assign="by-device"); steps, steps_asked: of all replies that were used. late: replies to
    earlier rounds that came in this one and were used, by node. noise: of the mean of the clients' changes
    (methods.noise): "signal-to-noise" and "cosine" with what would be left without noise, over all units but an exact
    head, and the same of each unit, with how many independent "estimates" that was measured from (1: from theory).
    epsilon: that all rounds so far have cost, at `privacy.delta`. sampled_from: clients from which `asked` were drawn
    so that nobody knows which; `asked` where it is known.
    """

    round: int
    rounds: int
    loss: float | None = None
    accuracy: float | None = None
    metrics: dict[str, float] | None = None
    main_metric: str = "accuracy"
    train_loss: float | None = None
    personalised_accuracy: float | None = None
    personalised: dict[str, float] | None = None
    mib_up: float = 0.0
    mib_down: float = 0.0
    forwards: float = 0.0
    seconds: float = 0.0
    client_seconds: float | None = None
    peak_mib: float | None = None
    asked: int = 0
    answered: int = 0
    refused: int = 0
    clipped: int = 0
    partial: int = 0
    steps: int = 0
    steps_asked: int = 0
    late: list[str] = field(default_factory=list)
    noise: dict[str, Any] | None = None
    epsilon: float | None = None
    sampled_from: int | None = None
    reasons: list[str] = field(default_factory=list)

    @property
    def main(self) -> float | None:
        """Of the global model."""
        return {"accuracy": self.accuracy, **(self.metrics or {})}.get(self.main_metric)

    @property
    def personalised_main(self) -> float | None:
        return (self.personalised or {}).get(self.main_metric)

    def as_json(self) -> str:
        return json.dumps({name.replace("_", "-"): value for name, value in asdict(self).items()})

    @classmethod
    def from_json(cls, line: str) -> Self:
        return cls(**{name.replace("-", "_"): value for name, value in json.loads(line).items()})


class Recorder:
    """Collects a round while it runs and writes it when it ends.

    after: the round after which the run in `folder` goes on; None for one that begins. telemetry: where else its
    numbers go.
    """

    def __init__(
        self, folder: Path, config: RunConfig, after: int | None = None, telemetry: Telemetry | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._flat = folder, config.flat()
        write_whole(folder / "config.json", json.dumps(self._flat, indent=2) + "\n")
        self._slopes: SlopeLog | None = None
        self.metrics_path = folder / "metrics.jsonl"
        self.rounds: list[Round] = []
        self._total, self._patience_s = config.num_server_rounds, config.server.round_timeout_s
        self._start = time.monotonic()
        self._bytes_up = self._bytes_down = 0
        self._forwards = 0.0
        self.task = get_task(config.data)
        self.current = self._round(0)
        self._after = after
        if after is not None:
            self._go_on(after)
        self.roster = Roster(folder, config, after)
        self._telemetry = telemetry or Telemetry()
        self.score: Score | None = None
        self.warnings: list[str] = []
        self.promised = ""
        """What the clients were promised of their privacy (privacy.py)."""
        self.stopped = ""
        """Why the run ends before its last round, once that is decided (stopping.py)."""

    def log_slopes(self, units: Mapping[str, Sequence[str]], fingerprint: str, digest: str) -> None:
        """From now on rounds have slopes to be kept. digest: of the tensors before the first of them."""
        path = self.folder / "slopes.jsonl"
        header = {"config": self._flat, "units": list(units), "fingerprint": fingerprint, "digest": digest}
        self._slopes = SlopeLog(path, header, [] if self._after is None else read(path, until=self._after)[1])

    def slopes(self, entry: Entry, digest: str, exact: Tensors) -> None:
        """What a round's scalars were, and the present values of what no scalar stands for."""
        if self._slopes is not None:
            self._slopes.append(entry, digest, exact)

    def _go_on(self, after: int) -> None:
        """Take over what was spent until round `after`; what was written of later rounds is written again."""
        try:
            whole = self.metrics_path.read_text().split("\n")[:-1]  # what follows the last end of line was cut short
            lines = [Round.from_json(line) for line in whole]
            self.rounds = [line for line in lines if line.round <= after]
            last = self.rounds[-1]
        except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise SpryError(f"{self.folder} cannot be resumed: its metrics.jsonl cannot be read ({error}).") from None
        write_whole(self.metrics_path, "".join(line.as_json() + "\n" for line in self.rounds))
        self._bytes_up, self._bytes_down = round(last.mib_up * MIB), round(last.mib_down * MIB)
        self._forwards, self._start = last.forwards, self._start - last.seconds

    def begin(self, round_: int) -> None:
        self.current, self.score = self._round(round_), None

    def _round(self, number: int) -> Round:
        return Round(number, self._total, main_metric=self.task.main_metric)

    def metrics_of(self, score: Score) -> dict[str, float]:
        """What the task makes of sums over one example or more."""
        return self.task.report(score.numbers())

    def sent(self, size_bytes: int) -> None:
        self._bytes_down += size_bytes

    def received(self, size_bytes: int) -> None:
        self._bytes_up += size_bytes

    def asked(
        self, tasks: Mapping[int, Task], units: Iterable[str], introduced: Mapping[int, Introduction], method: Method
    ) -> None:
        """What is asked of each node of the round. units: of the model. introduced: all nodes that can be used."""
        self.current.asked = len(tasks)
        self.roster.asked(tasks, units, introduced, method)

    def trained(self, accepted: Sequence[tuple[Task, TrainReply]]) -> None:
        """The replies that are used, with what was asked."""
        self.roster.used({task.client: reply.steps for task, reply in accepted})
        replies = [reply for _, reply in accepted]
        now, self._forwards = self.current, self._forwards + sum(reply.forwards for reply in replies)
        now.answered, now.partial = len(replies), sum(reply.partial for reply in replies)
        now.steps, now.steps_asked = sum(r.steps for r in replies), sum(r.steps_asked for r in replies)
        if not replies:
            return
        now.train_loss = sum(reply.loss * reply.examples for reply in replies) / sum(r.examples for r in replies)
        now.client_seconds = max(reply.seconds for reply in replies)
        now.peak_mib = max(reply.peak_mib for reply in replies) or None
        personal = [reply.personal for reply in replies if reply.personal is not None]
        if personal:
            now.personalised = self.metrics_of(functools.reduce(operator.add, personal))
            now.personalised_accuracy = now.personalised.get("accuracy")

    def late(self, tasks: Mapping[int, Task], used: Sequence[tuple[Task, TrainReply]]) -> None:
        """Replies to an earlier round that are used in this one, of those `tasks`."""
        self._forwards += sum(reply.forwards for _, reply in used)
        for node, task in tasks.items():
            if any(own is task for own, _ in used):
                self.current.late.append(f"node {node}: its reply to round {task.round}")
                log(INFO, "Used in round %d, late: %s", self.current.round, self.current.late[-1])

    def refuse(self, node: int, reason: str) -> None:
        """Count a reply that was not used, and say why."""
        reason = said(reason)
        self.current.refused += 1
        self.current.reasons.append(f"node {node}: {reason}")
        log(INFO, "Reply of node %s refused: %s", node, reason)

    def silent(self, nodes: Sequence[int]) -> None:
        """Say which nodes have not answered in time."""
        for node in nodes:
            self.current.reasons.append(
                f"node {node}: no answer within server.round-timeout-s ({self._patience_s:g} s)"
            )
            log(INFO, "%s", self.current.reasons[-1])

    def warn(self, sentence: str) -> None:
        """Say and keep what whoever started the run should know; an empty sentence is none."""
        if sentence:
            self.warnings.append(sentence)
            log(WARNING, "%s", sentence)

    def measured(self) -> Round:
        """The current round with what has been spent so far."""
        now = self.current
        now.mib_up, now.mib_down = self._bytes_up / MIB, self._bytes_down / MIB
        now.forwards, now.seconds = self._forwards, time.monotonic() - self._start
        return now

    def end(self, score: Score | None) -> None:
        """Close the round with the global model's score: the server's, else the clients', else none."""
        now, score = self.measured(), score or self.score
        if score is not None and score.examples:
            sums, now.metrics = score.numbers(), self.metrics_of(score)
            now.loss, now.accuracy = score.loss / sums[self.task.loss_over], now.metrics.get("accuracy")
        with self.metrics_path.open("a") as file:
            file.write(now.as_json() + "\n")
        self.roster.end(now.round)
        for sentence in self._telemetry.round(json.loads(now.as_json())):
            self.warn(sentence)
        self.rounds.append(now)
        log(INFO, "%s", self._sentence(now))

    def _sentence(self, now: Round) -> str:
        shown = {
            "loss": now.loss if now.loss is not None else now.train_loss,
            now.main_metric: now.main,
            "personalised": now.personalised_main,
            "epsilon": now.epsilon,
        }
        numbers = "".join(f"  {name} {value:.4f}" for name, value in shown.items() if value is not None)
        beside = "".join(f" ({n} {what})" for n, what in ((now.partial, "partial"), (len(now.late), "late")) if n)
        left = now.seconds / now.round * (now.rounds - now.round) if now.round else 0.0
        return (
            f"round {now.round}/{now.rounds}{numbers}  clients {now.answered}/{now.asked}{beside}  "
            f"sent {now.mib_down:.2f} MiB  received {now.mib_up:.2f} MiB  {left:.0f} s left"
        )
