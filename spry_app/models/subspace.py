"""Few coordinates in place of LoRA's tensors: theta = theta0 + P z, where z alone is trained and P is fixed. What is
saved is theta; nothing here trains.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from spry_app.autodiff.directions import Tensors
from spry_app.config import AdapterConfig
from spry_app.errors import SpryError
from spry_app.models.frames import frame, normals, singular
from spry_app.models.shared_vector import Picked, Transformed
from spry_app.models.units import COORDINATES

Layers = dict[str, Any]
"""Name of an adapted matrix -> its LoRA layer."""


@dataclass(frozen=True)
class Fixed:
    """What a subspace is made of and nobody trains, by name, on the CPU. Equal where the digests are."""

    digest: str
    tensors: Tensors = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Fixed":
        digest = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return cls(digest.hexdigest(), dict(tensors))


@dataclass(frozen=True)
class Subspace:
    """An adapter whose tensors depend on fewer coordinates, which are parameters of the model; this one is not.

    fixed: of the map. sent: part of it that a node cannot make by itself. moves: coordinates that move tensors of other
    names -> those. expand: replacements for parameters, by name -> the same with coordinates expanded into what they
    move, as derivatives flow. plain: the model's state as LoRA has it; None where it is so as it stands.
    """

    fixed: Fixed | None = None
    sent: Fixed | None = None
    moves: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    expand: Callable[[Tensors], Tensors] = lambda params: params
    plain: Callable[[], Tensors | None] = lambda: None


def install_subspace(model: PeftModel, adapter: AdapterConfig, seed: int, given: Fixed | None = None) -> Subspace:
    """Make the coordinates, at zero, the trainable parameters of `model` in place of LoRA's.

    given: the frame that the server has sent, or that of the run; None to compute it. Raises SpryError where the
    adapter has fewer numbers than coordinates, or the frame is that of another model.
    """
    made = SUBSPACES[adapter.subspace]
    if made is None:
        return Subspace()
    layers: Layers = {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    for name, layer in layers.items():
        most = min(layer.in_features, layer.out_features)
        if adapter.rank > most:
            raise SpryError(
                f"adapter.rank is {adapter.rank}, and {name} has {layer.in_features} inputs and {layer.out_features} "
                f"outputs: with adapter.subspace={adapter.subspace!r} the rank can be {most} at most."
            )
        for part in (layer.lora_A, layer.lora_B):
            part[_NAME].weight.requires_grad_(False)
    with torch.no_grad():
        return made(model, layers, adapter, seed, given)


_NAME = "default"
"""PEFT's for the only adapter."""


def _weight(layer: str, factor: str) -> str:
    return f"{layer}.lora_{factor}.{_NAME}.weight"


# -- a square matrix between two fixed factors ---------------------------------------------------------------------


class Between(nn.Linear):
    """LoRA's first factor as core @ weight, weight (rank, inputs) being fixed, which is never multiplied out: along a
    direction the weight has no tangent, and none of that size is computed or kept.
    """

    terms: Tensor | None
    coordinates: nn.Parameter

    @property
    def core(self) -> Tensor:
        """Shape (rank, rank)."""
        if self.terms is None:
            return self.coordinates
        return (self.coordinates @ self.terms).view(self.out_features, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight), self.core)


def _core(model: PeftModel, layers: Layers, adapter: AdapterConfig, seed: int, given: Fixed | None) -> Subspace:
    """A = z V, B = U with z (rank, rank), zero at the start: LoRA-XS, arXiv 2405.17604, with orthonormal factors."""
    return _between(model, layers, adapter, seed, given, lambda name: None)


def _combined(model: PeftModel, layers: Layers, adapter: AdapterConfig, seed: int, given: Fixed | None) -> Subspace:
    """The core is sum_i z_i P_i, with P_i fixed and orthonormal as vectors: TinyLoRA, arXiv 2602.04118.

    Our reading: a z for each matrix; the paper may tie those of several.
    """
    square, count = adapter.rank**2, adapter.coordinates
    return _between(model, layers, adapter, seed, given, lambda name: frame(square, count, f"{seed} {name} P"))


def _between(
    model: PeftModel,
    layers: Layers,
    adapter: AdapterConfig,
    seed: int,
    given: Fixed | None,
    terms: Callable[[str], Tensor | None],
) -> Subspace:
    factors = given or Fixed.of(FRAMES[adapter.frame](layers, adapter.rank, seed))
    _check(factors.tensors, layers, adapter)
    fixed, first = dict(factors.tensors), dict[str, Between]()
    for name, layer in layers.items():
        a, b = layer.lora_A[_NAME], layer.lora_B[_NAME]
        a.weight.copy_(fixed[f"{name}.V"])
        b.weight.copy_(fixed[f"{name}.U"].T)
        own = terms(name)
        size = (adapter.rank, adapter.rank) if own is None else (len(own),)
        a.__class__ = Between
        a.coordinates = nn.Parameter(a.weight.new_zeros(size))
        a.register_buffer("terms", None if own is None else own.to(a.weight), persistent=False)
        first[_weight(name, "A")] = a
        fixed |= {} if own is None else {f"{name}.P": own}

    def plain() -> Tensors:
        own = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[2] != COORDINATES}
        return own | {name: (a.core @ a.weight).detach() for name, a in first.items()}

    return Subspace(Fixed.of(fixed), factors if adapter.frame in SENT else None, plain=plain)


def _check(factors: Tensors, layers: Layers, adapter: AdapterConfig) -> None:
    wanted = {f"{name}.V": (adapter.rank, layer.in_features) for name, layer in layers.items()}
    wanted |= {f"{name}.U": (adapter.rank, layer.out_features) for name, layer in layers.items()}
    if {name: tuple(value.shape) for name, value in factors.items()} != wanted:
        raise SpryError(
            f"The frame given (adapter.frame={adapter.frame!r}) is for other matrices than this model's with "
            f"adapter.rank={adapter.rank}: every node must load the model.name of the run, and the frame be its own."
        )


def _random_frame(layers: Layers, rank: int, seed: int) -> Tensors:
    sides = {"U": "out_features", "V": "in_features"}
    return {
        f"{name}.{letter}": frame(getattr(layer, side), rank, f"{seed} {name} {letter}")
        for name, layer in layers.items()
        for letter, side in sides.items()
    }


def _singular_frame(layers: Layers, rank: int, seed: int) -> Tensors:
    return singular({name: layer.get_base_layer() for name, layer in layers.items()}, rank, seed)


FRAMES: dict[str, Callable[[Layers, int, int], Tensors]] = {"random": _random_frame, "singular": _singular_frame}
"""adapter.frame -> the rows of the fixed factors, "<matrix>.U" (rank, outputs) and "<matrix>.V" (rank, inputs)."""
SENT = frozenset({"singular"})
"""Those that the server alone computes: two machines would not get the same bits."""


# -- one vector for all matrices -----------------------------------------------------------------------------------


def _one_vector(kind: type[Picked] | type[Transformed]) -> "Make":
    def make(model: PeftModel, layers: Layers, adapter: AdapterConfig, seed: int, given: Fixed | None) -> Subspace:
        weights = {_weight(name, factor): name for name in layers for factor in "AB"}
        start = {weight: model.get_parameter(weight) for weight in weights}
        total, size = sum(value.numel() for value in start.values()), adapter.coordinates
        if size > total:
            raise SpryError(
                f"adapter.coordinates is {size}, and LoRA of adapter.rank {adapter.rank} has {total} numbers on this "
                f'model: lower adapter.coordinates, raise adapter.rank, or set adapter.subspace to "none".'
            )
        for weight, value in start.items():
            value.copy_(_start(weight, value, seed))
        maps = kind.maps(seed, {weight: value.numel() for weight, value in start.items()}, size)
        fixed = Fixed.of(maps | {weight: value.detach().to("cpu", torch.float32) for weight, value in start.items()})
        like = next(iter(start.values()))
        chunks = [part.clone() for part in like.new_zeros(size).tensor_split(min(len(layers), size))]
        copies = {weight: value.detach().clone() for weight, value in start.items()}
        vector = kind(chunks, copies, {weight: one.to(like.device) for weight, one in maps.items()})
        model.add_module(COORDINATES, vector)
        moves = {f"{COORDINATES}.{number}": tuple(weights) for number in range(len(chunks))}
        return Subspace(fixed, moves=moves, expand=vector.expand)

    return make


def _start(weight: str, value: Tensor, seed: int) -> Tensor:
    """theta0: as large as PEFT's for the first factor, zero for the second."""
    if ".lora_B." in weight:
        return torch.zeros_like(value)
    return normals(f"{seed} {weight} theta0", value.shape) / math.sqrt(3 * value.shape[1])


Make = Callable[[PeftModel, Layers, AdapterConfig, int, Fixed | None], Subspace]

SUBSPACES: dict[str, Make | None] = {
    "none": None,
    "core": _core,
    "combined": _combined,
    "shared": _one_vector(Picked),  # Uni-LoRA, arXiv 2506.00799
    "random": _one_vector(Transformed),  # intrinsic dimension, arXiv 1804.08838, by a structured transform
}
