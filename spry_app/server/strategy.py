"""A round of any Method as a Flower Strategy: assign, send, check, average per tensor, step."""

from collections.abc import Iterable, Sequence
from logging import INFO

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from spry_app.autodiff.directions import Seed, Tensors
from spry_app.autodiff.gradients import Gradient
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import Deal, Method
from spry_app.methods.replay import HEAD, client_rule, exact_names, local_steps, replay
from spry_app.models.units import depths
from spry_app.optimizers import SERVER_OPTIMIZERS, NamedOptimizer, Rule
from spry_app.protocol import (
    EVALUATE,
    MalformedReply,
    Score,
    Task,
    TrainReply,
    refusal_reason,
    size_bytes,
    to_arrays,
)
from spry_app.server.checks import most_forwards, problem
from spry_app.server.fleet import Fleet
from spry_app.server.record import Recorder
from spry_app.server.stopping import decide

MOST_BARREN_ROUNDS = 3
"""Rounds in a row without a usable reply after which the run ends."""
Units = dict[str, tuple[str, ...]]


class SpryStrategy(Strategy):
    """Runs any Method (SPRY by default, arXiv:2405.15551). To change a part, subclass and name it in `strategy`.

    config: of the run. method: what clients compute and send. units: unit -> names of its tensors. tensors: the
    trainable tensors (fp32) to start from. fingerprint: of the base model. recorder: gets counts and bytes.
    score_on_clients: the server has no test set, so clients score the global model on their held-out rows.
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
    ) -> None:
        self.config, self.method, self.units, self.recorder = config, method, units, recorder
        self.fingerprint, self.score_on_clients = fingerprint, score_on_clients
        self.depths, self.blocks = depths(units)
        self.exact = exact_names(units, method, config.head_gradient)
        self.fleet = Fleet(config.server, fingerprint)
        server = config.server
        rule = Rule(method.server_optimizer, server.learning_rate, 0.0, server.beta1, server.beta2, server.tau)
        head_rate = server.head_learning_rate or server.learning_rate
        self.optimizer = NamedOptimizer(
            tensors, SERVER_OPTIMIZERS, rule, {name: head_rate for name in units.get(HEAD, ())}
        )
        self.update: Tensors = {}
        """How the last round with a usable reply changed the tensors."""
        self.tasks: dict[int, Task] = {}
        self.barren_rounds = 0

    def snapshot(self) -> Tensors:
        """Copies of the current tensors."""
        return {name: value.clone() for name, value in self.optimizer.tensors.items()}

    # -- training ------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a node: its units, its seed, the current adapter."""
        self.recorder.begin(server_round)
        server = self.config.server
        nodes = self.fleet.available(grid)
        clients = self.fleet.sample(
            nodes, server.fraction_train, server.min_train_nodes, (self.config.seed, server_round)
        )
        hands = self.assign(self.fleet.memory_mib(clients), server_round)
        due = self.config.evaluates(server_round)
        tensors = self.snapshot()
        self.tasks = {
            node: Task(
                round=server_round,
                client=index,
                tensors=tensors,
                units=tuple(units),
                fingerprint=self.fingerprint,
                evaluate=due,
                measure=due and index == server_round % len(clients),
                update=self.update_for(units),
            )
            for index, (node, units) in enumerate(zip(clients, hands, strict=True))
        }
        messages = [task.to_message(node) for node, task in self.tasks.items()]
        self.recorder.current.asked = len(messages)
        self.recorder.sent(sum(map(size_bytes, messages)))
        return messages

    def update_for(self, units: Iterable[str]) -> Tensors:
        """What the method needs of the last update to choose directions for these units; nothing in the first round."""
        if not (self.method.pick.needs_update and self.update):
            return {}
        return {name: self.update[name] for unit in units for name in self.units[unit] if name not in self.exact}

    def assign(self, memory_mib: Sequence[float], round_: int) -> list[list[str]]:
        """The units of each client: the method's split, and the head to everyone where it is shared.

        memory_mib: what a training step may take on each client, 0.0 where it has not said. Raises SpryError where a
        method of the user's own deals out what there is not.
        """
        shared = [HEAD] if self.config.head == "shared" and HEAD in self.units else []
        dealt = tuple(unit for unit in self.units if unit not in shared)
        deal = Deal(
            units=dealt,
            depths=tuple(self.depths[unit] for unit in dealt),
            sizes=tuple(sum(self.optimizer.tensors[name].numel() for name in self.units[unit]) for unit in dealt),
            blocks=self.blocks,
            memory_mib=tuple(memory_mib),
            round=round_,
        )
        hands = self.method.assign(deal)
        unknown = sorted({unit for hand in hands for unit in hand} - set(dealt))
        if len(hands) != deal.clients or unknown:
            raise SpryError(
                f"`assign` of method={self.config.method!r} made {len(hands)} hands for {deal.clients} clients, with "
                f"unknown units {unknown}; it must make one hand a client, of deal.units."
            )
        return [[*hand, *shared] for hand in hands]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Mean per tensor over the clients that trained it, weighted by examples; then the server's step."""
        accepted = self._accept(replies)
        now = self.recorder.current
        now.answered = len(accepted)
        self.barren_rounds = 0 if accepted else self.barren_rounds + 1
        if self.barren_rounds == MOST_BARREN_ROUNDS:
            reasons = "\n".join(f"  {reason}" for reason in now.reasons) or "  no client answered in time"
            raise SpryError(f"No usable reply in {MOST_BARREN_ROUNDS} rounds; round {server_round}:\n{reasons}")
        if not accepted:
            return None, None
        examples = sum(reply.examples for _, reply in accepted)
        now.train_loss = sum(reply.loss * reply.examples for _, reply in accepted) / examples
        now.client_seconds = max(reply.seconds for _, reply in accepted)
        self.recorder.computed(sum(reply.forwards for _, reply in accepted))
        now.peak_mib = max(reply.peak_mib for _, reply in accepted) or None
        personal = [reply.personal for _, reply in accepted if reply.personal is not None]
        if personal:
            now.personalised_accuracy = sum(s.correct for s in personal) / sum(s.examples for s in personal)
        before = self.snapshot()
        self.optimizer.step(self.pseudo_gradient(accepted))
        self.update = {name: value - before[name] for name, value in self.optimizer.tensors.items()}
        return to_arrays(self.snapshot()), MetricRecord({"train-loss": now.train_loss})

    def pseudo_gradient(self, accepted: list[tuple[Task, TrainReply]]) -> Tensors:
        """Per tensor, the mean of the clients' changes (`change`) over those that trained it, weighted by examples."""
        total: Tensors = {}
        weight: dict[str, int] = {}
        for task, reply in accepted:
            for name, value in self.change(task, reply).items():
                change = value * reply.examples
                total[name] = total[name] + change if name in total else change
                weight[name] = weight.get(name, 0) + reply.examples
        return {name: value / weight[name] for name, value in total.items()}

    def change(self, task: Task, reply: TrainReply) -> Tensors:
        """What one client asks for: its gradient, or (value sent - value after its training)."""
        if self.method.reply == "gradient":
            return reply.tensors
        return {name: task.tensors[name] - value for name, value in self.trained(task, reply).items()}

    def trained(self, task: Task, reply: TrainReply) -> Tensors:
        """The client's tensors after its training: as sent, and the others rebuilt from its slopes."""
        seed = Seed(run=self.config.seed, round=task.round, client=task.client, step=0)
        replayed = {name: value for name, value in self.asked(task).items() if name not in reply.tensors}
        rule, gradient = client_rule(self.config.client), self.gradient(task)
        return reply.tensors | replay(replayed, reply.slopes, seed, rule, gradient)

    def gradient(self, task: Task) -> Gradient:
        """The client's way to a gradient: the method's, along the directions picked for this task."""
        return self.method.pick.gradient(self.method.gradient, task.update, self.config.client)

    def asked(self, task: Task) -> Tensors:
        """The tensors that the task's units consist of."""
        return {name: task.tensors[name] for unit in task.units for name in self.units[unit]}

    def _accept(self, replies: Iterable[Message]) -> list[tuple[Task, TrainReply]]:
        """Replies that can be averaged, in the order of the clients (arrival order differs from run to run)."""
        accepted: dict[int, tuple[Task, TrainReply]] = {}
        for message in replies:
            node = message.metadata.src_node_id
            self.recorder.received(size_bytes(message))
            task = self.tasks.get(node)
            try:
                reply = self._read(message, task)
                reason = self.problem(reply, task) if task else "it was not asked"
            except MalformedReply as error:
                reason = str(error)
            if reason or task is None:
                self.recorder.refuse(node, reason)
            elif task.client in accepted:
                self.recorder.refuse(node, "it answered before")
            else:
                accepted[task.client] = (task, reply)
        return [accepted[client] for client in sorted(accepted)]

    def problem(self, reply: TrainReply, task: Task) -> str:
        """Why a reply cannot be averaged; empty if it can."""
        asked = self.asked(task)
        as_they_are = asked.keys() & self.exact if self.method.reply == "slopes" else asked.keys()
        scalars = asked.keys() - as_they_are
        steps = local_steps(self.method, self.config.client) if scalars else 0
        tensors = {name: asked[name] for name in as_they_are}
        gradient, directions = self.gradient(task), self.config.client.directions
        slopes = directions * gradient.slopes_per_direction
        return problem(reply, tensors, steps, slopes, most_forwards(gradient, directions))

    @staticmethod
    def _read(message: Message, task: Task | None) -> TrainReply:
        if message.has_error():
            raise MalformedReply(message.error.reason or f"Flower error {message.error.code}")
        reason = refusal_reason(message)
        if reason:
            raise MalformedReply(reason)
        return TrainReply.from_message(message)

    # -- evaluation on clients -----------------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to score the global model, where the server has no test set of its own."""
        server = self.config.server
        last = decide(self.config, self.recorder)
        if not (self.score_on_clients and server.fraction_evaluate and (last or self.config.evaluates(server_round))):
            return []
        nodes = self.fleet.available(grid)
        nodes = self.fleet.sample(nodes, server.fraction_evaluate, 1, (self.config.seed, server_round, 1))
        tensors = self.snapshot()
        messages = [
            Task(round=server_round, client=index, tensors=tensors, units=(), fingerprint=self.fingerprint).to_message(
                node, EVALUATE
            )
            for index, node in enumerate(nodes)
        ]
        self.recorder.sent(sum(map(size_bytes, messages)))
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Sum the clients' scores into the round's."""
        total = Score(loss=0.0, correct=0, examples=0)
        for message in replies:
            self.recorder.received(size_bytes(message))
            try:
                if not (message.has_error() or refusal_reason(message)):
                    total += Score.from_message(message)
            except MalformedReply as error:
                self.recorder.refuse(message.metadata.src_node_id, str(error))
        if not total.examples:
            return None
        self.recorder.score = total
        return MetricRecord({"loss": total.loss / total.examples, "accuracy": total.correct / total.examples})

    def summary(self) -> None:
        """Say what will run."""
        trainable = sum(value.numel() for value in self.optimizer.tensors.values())
        log(INFO, "%s: %d units, %d trainable numbers", self.method.paper, len(self.units), trainable)
