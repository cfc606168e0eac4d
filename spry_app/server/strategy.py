"""A round of any Method as a Flower Strategy: assign, send, check, average per tensor, step."""

from collections.abc import Iterable, Sequence
from logging import INFO

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from spry_app.autodiff.directions import Tensors
from spry_app.autodiff.gradients import Gradient
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import Method, Pace, StepMemory
from spry_app.methods.global_state import GlobalState
from spry_app.methods.replay import seats
from spry_app.protocol import (
    EVALUATE,
    TRAIN,
    MalformedReply,
    Task,
    TrainReply,
    error_reason,
    lacks_memory,
    refusal_reason,
    size_bytes,
    to_arrays,
)
from spry_app.server.checkpoint import Checkpoint, Progress
from spry_app.server.checks import Asked, problem
from spry_app.server.clipping import clipped
from spry_app.server.combining import Combiner
from spry_app.server.crew import crew
from spry_app.server.dealing import asked_mib, deal_out
from spry_app.server.downlink import DOWNLINKS
from spry_app.server.evaluation import is_due, scoring_tasks, summed
from spry_app.server.fleet import Fleet
from spry_app.server.guard import Accepted
from spry_app.server.late import LATE_REPLIES
from spry_app.server.letters import Letters
from spry_app.server.noise import too_noisy
from spry_app.server.privacy import GUARDS
from spry_app.server.reading import Reader
from spry_app.server.record import Recorder
from spry_app.slope_log import Entry

MOST_BARREN_ROUNDS = 3
"""Rounds in a row without a usable reply after which the run ends."""
Units = dict[str, tuple[str, ...]]


class SpryStrategy(Strategy):
    """Runs any Method (SPRY by default, arXiv:2405.15551). To change a part, subclass and name it in `strategy`.

    config: of the run. method: what clients compute and send. units: unit -> names of its tensors. tensors: the
    trainable tensors (fp32) to start from. fingerprint: of the base model. recorder: gets counts and bytes.
    score_on_clients: the server has no test set, so clients score the global model on their held-out rows. frame: what
    clients cannot compute of the adapter (models.Subspace.sent).
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        method: Method,
        units: Units,
        tensors: Tensors,
        fingerprint: str,
        recorder: Recorder,
        score_on_clients: bool = False,
        frame: Tensors | None = None,
    ) -> None:
        self.config, self.method, self.units, self.recorder = config, method, units, recorder
        self.fingerprint, self.score_on_clients = fingerprint, score_on_clients and not config.privacy.mode
        self.fleet = Fleet(config.server, fingerprint, frame, recorder.sent)
        self.state = GlobalState(tensors, units, method, config)
        self.downlink = DOWNLINKS[method.send](self.state)
        self.guard = GUARDS[config.privacy.mode, config.privacy.unit](config, method, self.state, units, recorder)
        self.combiner = Combiner(config, method, self.state, units, self.guard)
        if method.reply == "slopes" and self.guard.logs_slopes:
            recorder.log_slopes(units, fingerprint, self.state.digest())
        self.update: Tensors = {}
        """How the last round with a usable reply changed the tensors."""
        self.tasks: dict[int, Task] = {}
        self.letters = Letters()
        self.reader = Reader(recorder, self._check, self.problem, self.clipped)
        self.late = LATE_REPLIES[config.server.late_replies](config.server.round_timeout_s)
        self.step_mib: StepMemory | None = None
        """What a step takes, for an assignment by memory (run.py); None where every step fits."""
        self.barren_rounds = 0
        self.rounds_before = 0
        """Those of the run that is resumed; Flower counts from 1 again."""

    def snapshot(self) -> Tensors:
        """Copies of the current tensors."""
        return self.state.tensors

    def checkpoint(self) -> Checkpoint:
        """Everything that the next round depends on."""
        progress = Progress(self.recorder.current.round, self.state.round, self.barren_rounds)
        kept = self.combiner.weighting.kept
        return Checkpoint(progress, self.snapshot(), self.state.optimizer.moments, self.update, kept, self.fleet.limits)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on after its round. Clients are then new to the downlink, which sends them every tensor at first."""
        progress = checkpoint.progress
        self.state.load(progress.state_round, checkpoint.tensors, checkpoint.moments)
        self.update, self.barren_rounds, self.rounds_before = checkpoint.update, progress.barren_rounds, progress.round
        self.combiner.weighting.load(checkpoint.weighting)
        self.fleet.limits = dict(checkpoint.limits)
        self.downlink = DOWNLINKS[self.method.send](self.state)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a node: its units, its seed, the current adapter."""
        server_round += self.rounds_before
        self.recorder.begin(server_round)
        self.late.look(grid)
        nodes = self.late.free(self.fleet.available(grid))
        order = self.guard.order(server_round, len(nodes))
        clients = crew(self.config, self.method, self.state, self.fleet, nodes, self.assign, server_round, order)
        perturbed = [self.perturbed(share, share.gradient) for share in clients.shares]
        seats_of = seats(self.method, clients.directions, perturbed)
        due = self.config.evaluates(server_round)
        tensors = self.snapshot()
        self.tasks = {
            node: Task(
                round=server_round,
                client=index,
                tensors=tensors,
                units=tuple(share),
                fingerprint=self.fingerprint,
                number=seat.number,
                sharing=seat.sharing,
                directions=seat.directions,
                gradient=share.gradient,
                evaluate=due and not self.config.privacy.mode,
                measure=due and index == server_round % len(seats_of),
                update=self.update_for(share, share.gradient),
                deadline_s=self.config.client.deadline_s,
                steps=share.steps,
            )
            for index, (node, share, seat) in enumerate(zip(clients.nodes, clients.shares, seats_of, strict=True))
        }
        self.recorder.asked(self.tasks, self.units, self.fleet.introductions, self.method)
        self.guard.begin(self.tasks, nodes, arrays, self.fleet)
        if server_round == self.rounds_before + 1:
            self.recorder.warn(too_noisy(self.config, self.state, self.method, self.tasks.values()))
        return self._messages(self.tasks, TRAIN)

    def _messages(self, tasks: dict[int, Task], message_type: str) -> list[Message]:
        """One a node, counted."""
        for node in tasks:
            self.downlink.met(node, self.fleet.digest(node))
        outgoing = [self.downlink.outgoing(node, task).to_message(node, message_type) for node, task in tasks.items()]
        messages = [self.fleet.equip(message) for message in outgoing]
        self.recorder.sent(sum(map(size_bytes, messages)))
        self.letters = Letters(messages)
        return messages

    def perturbed(self, units: Iterable[str], gradient: str = "") -> dict[str, int]:
        """The tensors that slopes of these units are for, and how many numbers each has."""
        return self.state.perturbed(units, gradient)

    def update_for(self, units: Iterable[str], gradient: str = "") -> Tensors:
        """What the method needs of the last update to choose directions for these units; nothing in the first round."""
        if not (self.method.taking(gradient).pick.needs_update and self.update):
            return {}
        return {name: self.update[name] for name in self.perturbed(units, gradient)}

    def assign(
        self,
        memory_mib: Sequence[float],
        round_: int,
        gradients: Sequence[tuple[str, ...]] = (),
        paces: Sequence[Pace] = (),
    ) -> Sequence[Sequence[str]]:
        """The units of each client, or its Share.

        memory_mib: what a training step may take on each client, 0.0 where it has not said. gradients: that it can
        take. paces: how fast it is; none where nobody is to do less for that. Raises SpryError where a method of the
        user's own deals out what there is not.
        """
        tensors, known = self.state.optimizer.tensors, (memory_mib, round_, gradients, self.step_mib, paces)
        return deal_out(self.config, self.method, self.units, tensors, *known)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Mean per tensor over the clients that trained it, weighted by examples; then the server's step."""
        server_round += self.rounds_before
        late, accepted = self.reader.late(self.late.come()), self._accept(replies)
        now = self.recorder.current
        self.recorder.trained(accepted)
        accepted += late
        self.barren_rounds = 0 if accepted else self.barren_rounds + 1
        if self.barren_rounds == MOST_BARREN_ROUNDS:
            reasons = "\n".join(f"  {reason}" for reason in now.reasons)
            raise SpryError(f"No usable reply in {MOST_BARREN_ROUNDS} rounds; round {server_round}:\n{reasons}")
        if not accepted:
            return None, None
        before, accepted = self.snapshot(), self.guard.replies(self.combiner.as_used(accepted))
        entry = self.entry(accepted)
        self.state.step(server_round, self.pseudo_gradient(accepted), self.combiner.hands(accepted))
        self.combiner.learn(accepted)
        after = self.snapshot()
        self.update = {name: value - before[name] for name, value in after.items()}
        self.downlink.append(entry)
        if self.method.reply == "slopes":
            exact = {name: after[name] for name in sorted(self.state.exact)}
            self.recorder.slopes(entry, self.state.digest(), exact)
        return to_arrays(after), MetricRecord({"train-loss": now.train_loss or 0.0})

    def pseudo_gradient(self, accepted: Accepted) -> Tensors:
        """Per tensor, the mean of the clients' changes over those that trained it, weighted as `server.weighting` says.

        A Strategy that makes it otherwise needs send="weights": clients that follow the slope log would not know.
        """
        return self.combiner.mean(accepted)

    def entry(self, accepted: Accepted) -> Entry:
        """What was measured in the round of these tasks; nothing where no scalars came."""
        return self.combiner.entry(accepted)

    def change(self, task: Task, reply: TrainReply) -> Tensors:
        """What one client asks for by tensors: its gradient, or (value sent - value after its training)."""
        return self.combiner.change(task, reply)

    def gradient(self, task: Task) -> Gradient:
        """The client's way to a gradient, along the directions picked for this task."""
        own = self.method.taking(task.gradient)
        return own.pick.gradient(own.gradient, task.update, self.config.client)

    def asked(self, task: Task) -> Tensors:
        """The tensors that the task's units consist of."""
        return {name: task.tensors[name] for unit in task.units for name in self.units[unit]}

    def _accept(self, replies: Iterable[Message]) -> Accepted:
        """Replies of this round that can be averaged."""
        accepted = self.reader.read(replies, self.letters, self.tasks)
        self.recorder.silent(self.late.closed(self.letters, self.tasks))
        return accepted

    def clipped(self, task: Task, reply: TrainReply) -> TrainReply:
        """No more of a reply than one client may ask for."""
        zero = self.method.reply == "gradient"
        start = {name: torch.zeros_like(value) if zero else value for name, value in self.asked(task).items()}
        found = clipped(reply, start, self.config.server)
        self.recorder.current.clipped += found is not reply
        return found

    def problem(self, reply: TrainReply, task: Task) -> str:
        """Why a reply cannot be averaged; empty if it can."""
        tensors, exact, gradient = self.asked(task), self.state.exact, self.gradient(task)
        asked = Asked.of(task, tensors, exact, gradient, self.method, self.config.client)
        return problem(reply, asked)

    def _check(self, message: Message, node: int) -> None:
        """Whether the node has followed and answered. Raises MalformedReply."""
        reason = error_reason(message) or refusal_reason(message)
        if reason:
            self.downlink.lost(node)
            self.fleet.lost(node)
            if lacks_memory(message) and node in self.tasks and self.step_mib:
                self.fleet.limit(node, asked_mib(self.tasks[node], self.method, self.units, self.step_mib) / 2)
            raise MalformedReply(reason)
        self.downlink.followed(node)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to score the global model, where the server has no test set of its own."""
        server_round += self.rounds_before
        if not (self.score_on_clients and is_due(self.config, self.recorder, server_round)):
            return []
        tensors = self.snapshot()
        tasks = scoring_tasks(self.config, self.fleet, grid, server_round, tensors, self.fingerprint)
        return self._messages(tasks, EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Sum the clients' scores into the round's."""
        return summed(replies, self.recorder, self.letters, self._check)

    def summary(self) -> None:
        """Say what will run."""
        trainable = sum(value.numel() for value in self.state.optimizer.tensors.values())
        log(INFO, "%s: %d units, %d trainable numbers", self.method.paper, len(self.units), trainable)
