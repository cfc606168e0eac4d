"""One round of a federation at given tensors, through the real strategy and ClientApp: what it takes for the gradient.
No step is kept, and nothing is compared here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from benchmarks.local_grid import LocalGrid
from spry_app.config import RunConfig, Scalar
from spry_app.data import label_names
from spry_app.errors import SpryError
from spry_app.methods import Layout, get_method
from spry_app.models import load_model
from spry_app.protocol import Task, Tensors, TrainReply, to_arrays
from spry_app.server.record import Recorder
from spry_app.server.strategy import SpryStrategy

RATE = 1.0
"""The clients' step size: what one step changes is then the gradient, whether weights travel or slopes."""
KEYS: Mapping[str, Scalar] = {
    "num-server-rounds": 1_000_000,
    "server.evaluate-every": 1_000_000,
    "client.optimizer": "sgd",
    "client.learning-rate": RATE,
    "client.head-learning-rate": 0.0,
    "client.local-steps": 1,
    "client.micro-batch": 0,
}
"""Nobody is evaluated, and every client takes one plain step on one batch."""


@dataclass(frozen=True)
class Seen:
    """mean: per tensor, over the clients that trained it. perturbed: for each client, its tensors that slopes are for,
    and how many numbers each has. replies: by client.
    """

    mean: Tensors
    perturbed: list[dict[str, int]]
    replies: list[TrainReply]


class _Watched(SpryStrategy):
    """Keeps what it was about to step along."""

    seen: Seen

    def pseudo_gradient(self, accepted: list[tuple[Task, TrainReply]]) -> Tensors:
        mean = super().pseudo_gradient(accepted)
        self.seen = Seen(mean, [self.perturbed(task.units) for task, _ in accepted], [reply for _, reply in accepted])
        return mean


class Rounds:
    """A federation that can be asked for any round. All nodes take part in each; equal seeds have equal rows.

    run_config: what is not in KEYS. start: the tensors before all training.
    """

    def __init__(self, run_config: Mapping[str, Scalar], clients: int, folder: Path) -> None:
        whole = {**run_config, **KEYS, "server.min-train-nodes": clients}
        if get_method(RunConfig.from_flower(whole)).reply == "slopes":
            whole["send"] = "weights"  # the tensors are set from outside, which a slope log cannot tell
        config = RunConfig.from_flower(whole)
        adapted = load_model(config.model, config.adapter, len(label_names(config.data)), config.seed)
        self.start, frame = adapted.tensors(), adapted.subspace.sent
        self._grid = LocalGrid(clients, whole)
        self._strategy = _Watched(
            config=config,
            method=get_method(config).on(Layout(adapted.depths(), len(adapted.blocks)), config.client),
            units=adapted.units,
            tensors=self.start,
            fingerprint=adapted.fingerprint,
            recorder=Recorder(folder, config),
            frame=frame.tensors if frame else None,
        )

    def at(self, tensors: Tensors, round_: int) -> Seen:
        """Raises SpryError where a client gave no usable reply."""
        strategy, grid = self._strategy, cast(Grid, self._grid)
        strategy.state.load(round_ - 1, tensors, {})
        messages = list(strategy.configure_train(round_, to_arrays(tensors), ConfigRecord(), grid))
        strategy.aggregate_train(round_, grid.send_and_receive(messages))
        now = strategy.recorder.current
        if now.answered < now.asked:
            raise SpryError(f"{now.asked - now.answered} of {now.asked} clients gave no usable reply: {now.reasons}")
        return strategy.seen
