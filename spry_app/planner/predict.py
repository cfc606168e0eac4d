"""What one task of a client takes, from the task itself: it runs on tensors without data (autodiff.memory). Nothing is
compared or chosen here.
"""

import contextlib
import dataclasses
import functools
import math
from dataclasses import dataclass

import torch

from spry_app.autodiff.budget import SMALLEST, Slices
from spry_app.autodiff.costs import Cost, suffix_above
from spry_app.autodiff.directions import Seed
from spry_app.autodiff.memory import MIB, on_the_host, with_peak
from spry_app.autodiff.workspace import workspace
from spry_app.client.training import prefix_of, train
from spry_app.config import DataConfig, RunConfig
from spry_app.methods import Method
from spry_app.methods.global_state import GlobalState, merged
from spry_app.methods.replay import exact_names, local_steps
from spry_app.models import AdaptedModel
from spry_app.models.positions import positions
from spry_app.models.skeleton import weights_bytes
from spry_app.objectives import objective
from spry_app.planner.blank import node_of
from spry_app.planner.ways import Way
from spry_app.protocol import Task, TrainReply, content_bytes
from spry_app.server.downlink import DOWNLINKS
from spry_app.slope_log import Entry, Measured
from spry_app.tasks import get_task


@dataclass(frozen=True)
class Memory:
    """MiB on the device at the worst moment of a task, by what they are for; they add up to `total`.

    activations: of a forward pass alone. tangents_or_graph: what the way to the gradient keeps beside. optimizer: the
    tensors that are trained, as the client and its optimizer hold them. workspace: temporaries of single operations.
    """

    weights: float
    activations: float
    tangents_or_graph: float
    optimizer: float
    workspace: float

    @property
    def total(self) -> float:
        return self.weights + self.activations + self.tangents_or_graph + self.optimizer + self.workspace


@dataclass(frozen=True)
class Bytes:
    """Of a round in which nobody was missing, for one client, as serialised."""

    up: int
    down: int


class Predictor:
    """A model on "meta", asked again and again. host: it stands for one on the CPU, else for one on a GPU."""

    def __init__(self, adapted: AdaptedModel, host: bool) -> None:
        self.adapted, self._host = adapted, host
        virtual = getattr(adapted.model.active_peft_config, "num_virtual_tokens", 0)
        found = positions(adapted.model)
        self.places = None if found is None else found - virtual
        """Tokens that the model has places for; None where it takes any number."""
        self.weights_mib = weights_bytes(adapted.model) / MIB

    def length(self, config: RunConfig) -> int:
        """Tokens of the longest rows that a run may have."""
        return min(config.data.max_length, self.places or config.data.max_length)

    def memory(self, way: Way, slices: Slices) -> Memory:
        """Of a task of the run, in these slices."""
        length = self.length(way.config)
        whole, step = self.peaks(way, slices)
        tight = self.alone(way, dataclasses.replace(slices, workspace_bytes=SMALLEST.workspace_bytes), length)[1]
        activations = min(tight, self._forward(way.config.data, slices.micro_batch, length))
        room = max(0.0, min(slices.workspace_bytes / MIB, step - tight))
        return Memory(self.weights_mib, activations, step - room - activations, whole - step, room)

    def peaks(self, way: Way, slices: Slices) -> tuple[float, float]:
        """MiB above the model at the worst moment of a task, and of its step.

        From the third on, each micro-batch adds as much as the one before: what it leaves behind until the last.
        """
        batch, length = way.config.client.batch_size, self.length(way.config)
        parts = math.ceil(batch / slices.micro_batch)
        counts = [batch] if parts <= 2 else [2 * slices.micro_batch, 3 * slices.micro_batch]
        found = [self._train(way, slices, rows, length) for rows in counts]
        more = max(0, parts - 3) if len(found) > 1 else 0
        last, first = found[-1], found[0]
        whole = last.peak_mib + (last.peak_mib - first.peak_mib) * more
        return whole, last.reply.peak_mib + (last.reply.peak_mib - first.reply.peak_mib) * more

    def first_two(self, way: Way, slices: Slices) -> tuple[float, float]:
        """The same for two micro-batches at the most: a little less than for many, and sooner known."""
        found = self._any(way, slices)
        return found.peak_mib, found.reply.peak_mib

    def alone(self, way: Way, slices: Slices, length: int) -> tuple[float, float]:
        """The same for a batch of one micro-batch, of so many tokens an example."""
        found = self._train(way, slices, slices.micro_batch, length)
        return found.peak_mib, found.reply.peak_mib

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def _forward(self, data: DataConfig, rows: int, length: int) -> float:
        """Peak of a pass that nothing is asked of but the loss."""
        node = node_of(self.adapted, get_task(data), rows, length)
        loss = objective(self.adapted, node.train, range(rows), Seed(0, 0, 0, 0))
        with self._counting(), torch.no_grad(), workspace(SMALLEST.workspace_bytes):
            return with_peak(lambda: loss(node.start), self.adapted.device)[1]

    def forwards(self, way: Way, slices: Slices) -> float:
        """What a step costs, in forward passes of one example through the model."""
        client, own = way.config.client, self._trained(way)
        done = self._any(way, slices)
        blocks = len(self.adapted.blocks)
        node = node_of(self.adapted, get_task(way.config.data), 1, self.length(way.config))
        with prefix_of(node, own, way.config) as prefix:
            kept = prefix.depth / blocks if prefix and blocks else 0.0
        suffix = suffix_above(self.adapted.depth(own), blocks)

        def of(directions: int) -> float:
            cost: Cost = way.method.gradient.cost(directions, slices.directions_at_once)
            return cost.forwards(suffix, kept)

        each = done.reply.forwards / done.reply.examples
        return client.batch_size * (each + of(client.directions) - of(_few(way, slices)))

    def perturbed(self, way: Way) -> int:
        """How many numbers the slopes of the client are for; 0 where it has none."""
        if way.method.gradient.slopes is None:
            return 0
        exact = exact_names(self.adapted.units, way.method, way.config.head_gradient)
        return sum(self.adapted.model.get_parameter(name).numel() for name in self._trained(way) if name not in exact)

    def bytes(self, way: Way, slices: Slices, clients: int) -> Bytes:
        """From the messages themselves."""
        done = self._any(way, slices)
        width = way.config.client.directions * way.method.gradient.slopes_per_direction
        slopes = ((0.5,) * width,) * local_steps(way.method, way.config.client) if done.reply.slopes else ()
        state = GlobalState(done.task.tensors, self.adapted.units, way.method, way.config)
        downlink = DOWNLINKS[way.method.send](state)
        downlink.met(0, state.digest())
        if slopes:
            number = {unit: index for index, unit in enumerate(self.adapted.units)}
            held, shared = tuple(number[unit] for unit in way.units), way.method.seeds == "shared"
            each = [Measured(0 if shared else client, held, 1, slopes) for client in range(clients)]
            downlink.append(Entry(1, merged(each)))
        told = dataclasses.replace(done.reply, slopes=slopes)
        return Bytes(content_bytes(told.content()), content_bytes(downlink.outgoing(0, done.task).content()))

    def _any(self, way: Way, slices: Slices) -> "_Done":
        """A task that has been done anyway."""
        return self._train(
            way, slices, min(way.config.client.batch_size, 2 * slices.micro_batch), self.length(way.config)
        )

    def _train(self, way: Way, slices: Slices, rows: int, length: int) -> "_Done":
        """One step of the client on so many rows, its message read and its reply made."""
        changed = {"local_steps": 1, "batch_size": rows, "directions_at_once": 1, "prefix_cache_disk_mib": 0}
        client = way.config.client.model_copy(update=changed)
        config = way.config.model_copy(update={"client": client, "gradient": "", "assign": ""})
        return self._done(way.method, config, way.units, slices, _few(way, slices), length)

    @functools.lru_cache(maxsize=512)  # noqa: B019
    def _done(
        self, method: Method, config: RunConfig, units: tuple[str, ...], slices: Slices, directions: int, length: int
    ) -> "_Done":
        """Once for all ways that come to the same."""
        node = node_of(self.adapted, get_task(config.data), config.client.batch_size, length)
        task = Task(
            round=1,
            client=0,
            tensors=node.start,
            units=units,
            fingerprint="0" * 64,
            directions=directions,
            measure=True,
        )
        with self._counting():
            reply, peak = with_peak(functools.partial(train, node, task, method, config, slices), self.adapted.device)
        return _Done(task, reply, peak)

    def _counting(self) -> contextlib.AbstractContextManager[None]:
        return on_the_host() if self._host else contextlib.nullcontext()

    def _trained(self, way: Way) -> list[str]:
        return [name for unit in way.units for name in self.adapted.units[unit]]


@dataclass(frozen=True)
class _Done:
    """peak_mib: above the model, of everything from the message to the reply."""

    task: Task
    reply: TrainReply
    peak_mib: float


def _few(way: Way, slices: Slices) -> int:
    """As many directions as share a pass: those that follow take the place of these."""
    return min(way.config.client.directions, slices.directions_at_once)
