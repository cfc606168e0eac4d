"""One step, in all the ways that are compared. Neither time nor memory is read here."""

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models import LABELS, SHAPES, build
from spry_app.autodiff.bisection import Chain
from spry_app.autodiff.directions import Seed, Tensors, direction
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.autodiff.slopes import Batch, Objective, Part
from spry_app.autodiff.workspace import DEFAULT_BYTES, workspace
from spry_app.models import AdaptedModel, Entering
from spry_app.models.units import HEAD, Units

CLIENTS = 10
"""Among so many a cyclic split deals the units; the one who gets the lowest is measured."""
SEED = Seed(run=0, round=0, client=0, step=0)


Loss = Callable[[AdaptedModel, Tensors, dict[str, Tensor], Tensor, Entering | None], Tensor]
"""(model, trained tensors, inputs, labels, where the pass begins) -> mean loss."""

LOSSES: dict[str, Loss] = {
    "classification": lambda adapted, params, inputs, labels, entering: F.cross_entropy(
        adapted.logits(params, inputs, entering=entering), labels
    ),
    # In chunks of tokens for every variant alike.
    "causal": lambda adapted, params, inputs, labels, entering: adapted.next_token_loss(
        params, inputs, inputs["input_ids"], entering=entering
    ),
}


@dataclass(frozen=True)
class Settings:
    """What is measured. bits 0: no quantisation; layers 0: all of the model's; directions: K; workspace_kib: what the
    temporaries of one operation may take (attention scores, logits over a vocabulary).
    """

    model: str
    batch: int = 8
    length: int = 128
    directions: int = 1
    units: str = "all"
    device: str = "cpu"
    dtype: str = "float32"
    bits: int = 0
    layers: int = 0
    task: str = "classification"
    workspace_kib: int = DEFAULT_BYTES >> 10


@dataclass(frozen=True)
class Variant:
    """`step` takes a batch and the trained tensors. eager: attention as transformers writes it out. prefix: what enters
    the lowest trained block was kept from an earlier step.
    """

    step: Callable[[Batch, Tensors], object]
    eager: bool = False
    prefix: bool = False


@dataclass(frozen=True)
class Work:
    """A model, what of it is trained (fp32, on the CPU, as a client keeps it), and a batch without padding."""

    adapted: AdaptedModel
    params: Tensors
    tokens: Tensor
    labels: Tensor
    loss: Loss
    workspace_bytes: int
    weights_mib: float
    random: bool

    def run(self, variant: Variant, micro_batch: int) -> Callable[[], object]:
        """The step, ready to be measured. micro_batch 0: the batch as a whole."""
        size = micro_batch or len(self.tokens)
        slices = zip(torch.split(self.tokens, size), torch.split(self.labels, size), strict=True)
        whole = len(self.tokens)
        batch = [
            Part(self._objective(variant, *part), len(part[0]) / whole, chain=functools.partial(self._chain, *part))
            for part in slices
        ]

        def step() -> object:
            with workspace(self.workspace_bytes):
                return variant.step(batch, self.params)

        return step

    def _chain(self, tokens: Tensor, labels: Tensor, names: Collection[str]) -> Chain:
        inputs = {"input_ids": tokens}
        return self.adapted.chain(
            inputs, names, lambda params, here: self.loss(self.adapted, params, inputs, labels, here)
        )

    def _objective(self, variant: Variant, tokens: Tensor, labels: Tensor) -> Objective:
        inputs, adapted = {"input_ids": tokens}, self.adapted
        entering = adapted.prefix(inputs, adapted.depth(self.params)) if variant.prefix else None

        def loss_of(params: Tensors) -> Tensor:
            with _eager_attention(adapted, variant.eager):
                return self.loss(adapted, params, inputs, labels, entering)

        return loss_of


def prepare(settings: Settings) -> Work:
    """Model and batch, on the device; random tokens of full length, so that nothing is padding."""
    built = build(settings.model, settings.device, settings.dtype, settings.bits, settings.layers, settings.task)
    draw = torch.Generator().manual_seed(0)
    shape, device = (settings.batch, settings.length), built.adapted.device
    words = SHAPES[settings.model].get("vocab_size", 30522)
    tokens = torch.randint(3, words, shape, generator=draw).to(device)
    labels = torch.randint(0, LABELS, shape[:1], generator=draw).to(device)
    loss = LOSSES[settings.task]
    own = {name: built.adapted.model.get_parameter(name) for name in UNITS[settings.units](built.adapted.units)}
    params = {name: 0.02 * torch.randn(tensor.shape, generator=draw) for name, tensor in own.items()}
    room = settings.workspace_kib << 10
    return Work(built.adapted, params, tokens, labels, loss, room, built.weights_mib, built.random)


def _names(units: Units, which: slice) -> list[str]:
    chosen = [unit for unit in units if unit != HEAD][which]
    return [name for unit in [*chosen, HEAD] for name in units.get(unit, ())]


UNITS: dict[str, Callable[[Units], list[str]]] = {
    "all": lambda units: _names(units, slice(None)),
    "top": lambda units: _names(units, slice(-1, None)),
    "cyclic": lambda units: _names(units, slice(0, None, CLIENTS)),
}
"""Names of the trained tensors; the head is always among them, as every client trains it."""


def _inference(batch: Batch, params: Tensors) -> object:
    with torch.no_grad():
        return [part.objective(params) for part in batch]


def gradient(name: str, directions: int = 1, at_once: int = 1) -> Callable[[Batch, Tensors], object]:
    """A row of the app's own table."""
    return lambda batch, params: GRADIENTS[name].estimate(batch, params, SEED, directions, at_once)


def _published(batch: Batch, params: Tensors) -> object:
    """As in SPRY's code (arXiv 2405.15551): torch.func.jvp, PyTorch's own rules everywhere."""
    v = direction(SEED, 0, params)
    with torch.no_grad():
        slopes = [torch.func.jvp(part.objective, (params,), (v,))[1] * part.weight for part in batch]
    slope = torch.stack(slopes).sum().item()
    return {name: tensor * slope for name, tensor in v.items()}


@contextmanager
def _eager_attention(adapted: AdaptedModel, on: bool) -> Iterator[None]:
    config: Any = adapted.model.get_base_model().config
    before = config._attn_implementation
    config._attn_implementation = "eager" if on else before
    try:
        yield
    finally:
        config._attn_implementation = before


INFERENCE, BACKPROP = "inference", "backprop"
CHECKPOINTED, BISECTED = "backprop + checkpointing", "backprop, bisected"
PUBLISHED, OURS, KEPT = "forward mode, as published", "forward mode, ours", "ours, K at once, prefix kept"


def variants(settings: Settings) -> dict[str, Variant]:
    """By name; more of them where there are several directions, or blocks below all trained tensors."""
    rows = {
        INFERENCE: Variant(_inference),
        BACKPROP: Variant(gradient("backprop")),
        CHECKPOINTED: Variant(gradient("checkpointed-backprop")),
        BISECTED: Variant(gradient("bisected-backprop")),
        "central difference": Variant(gradient("central-difference")),
        PUBLISHED: Variant(_published, eager=True),
        OURS: Variant(gradient("forward-mode")),
    }
    k = settings.directions
    if k > 1:
        rows[together(k)] = Variant(gradient("forward-mode", k, k))
        rows[f"ours, {k} directions, one by one"] = Variant(gradient("forward-mode", k))
    if settings.units == "top":
        rows[KEPT] = Variant(gradient("forward-mode", k, k), prefix=True)
    return rows


def together(directions: int) -> str:
    """Name of the row whose directions share a pass."""
    return f"ours, {directions} directions at once"
