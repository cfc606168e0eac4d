"""Does forward mode tell the truth on this model, as loaded, on this device? Asked before training; repairs nothing."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spry_app.autodiff.culprit import find_culprit
from spry_app.autodiff.directions import Seed, Tensors, direction
from spry_app.autodiff.duals import wide
from spry_app.autodiff.slopes import ForwardModeError, Objective, Part, SlopeRule, central_difference, forward_mode

LADDER = tuple(0.4 / 2**rung for rung in range(10))
"""Steps of the differences, in units of each tensor's own size: the long ones rise above the rounding of a half format,
the short ones resolve a sharp loss."""

TRIES = 3
"""Directions that must all disagree: a lost tangent is wrong along each, a kink (ReLU) a difference by chance."""

ROUNDING = 4.0
"""Rounding of the loss, in units of the coarsest format's last place: about the most that was seen on tiny encoders and
decoders and on MiniLM, in fp32 and bf16, where no kink was near."""


class SelfTestError(RuntimeError):
    """Slopes of this model cannot be trusted; says which module is at fault and what to change."""


@dataclass(frozen=True)
class _Reference:
    """A slope from differences and how far off it may be."""

    slope: float
    error: float


@dataclass(frozen=True)
class Disagreement:
    """A slope that is none of the objective at `point`, along `probe`. slope: None where it is missing."""

    kind: str
    slope: float | None
    reference: _Reference
    point: Tensors
    probe: Tensors

    def __str__(self) -> str:
        told = "missing" if self.slope is None else f"{self.slope:.6g}"
        return (
            f"the slope along {self.kind!r} is {told}, a central difference gives {self.reference.slope:.6g} "
            f"(+- {self.reference.error:.2g})"
        )


def self_test(
    objective: Objective, params: Tensors, module: nn.Module | None, seed: int = 0, slopes: SlopeRule = forward_mode
) -> None:
    """Raises SelfTestError where slopes disagree with central differences. `module` is what `objective` runs, for its
    number formats and to name the one at fault.
    """
    found = disagreement(objective, params, module, seed, slopes)
    if found is not None:
        eps = _coarsest_eps(params, module)
        raise SelfTestError(
            f"{found}. {find_culprit(objective, found.point, found.probe, module, slopes, eps)}"
            ' Or choose gradient = "central-difference" or "backprop", which need no tangents.'
        )


def disagreement(
    objective: Objective, params: Tensors, module: nn.Module | None, seed: int = 0, slopes: SlopeRule = forward_mode
) -> Disagreement | None:
    """The first slope that disagrees with central differences, one direction for each kind of tensor (layers counted as
    one); None for none. A few small passes per kind; give it two or three short examples.
    """
    eps = _coarsest_eps(params, module)
    # In fp32 smooth models agreed to 1e-3 where rounding let them; a half format rounds the jvp itself by some percent.
    tolerance = 0.02 if eps < 1e-4 else 0.15
    point = {name: _nonzero(name, tensor, seed) for name, tensor in params.items()}
    rounding = ROUNDING * eps * max(1.0, _loss(objective, point, eps))
    for kind, names in _kinds(point).items():
        for k in range(TRIES):
            probe = _probe(point, names, seed, k)
            slope = _slope(objective, point, probe, slopes)
            reference = _difference(objective, point, probe, rounding, slope, tolerance)
            if _agree(slope, reference, tolerance):
                break
        else:
            return Disagreement(kind, slope, reference, point, probe)
    return None


def shared_pass_test(objective: Objective, params: Tensors, module: nn.Module | None, seed: int = 0) -> None:
    """Compare the slopes of two directions that share a pass with those of each alone. Raises SelfTestError."""
    tolerance = 1e-3 if _coarsest_eps(params, module) < 1e-4 else 0.15
    point = {name: _nonzero(name, tensor, seed) for name, tensor in params.items()}
    probes = [_probe(point, list(point), seed, k) for k in range(2)]
    batch = [Part(objective, 1.0)]
    alone = forward_mode(batch, point, probes)[1]
    try:
        together = forward_mode(batch, point, probes, at_once=2)[1]
    except (RuntimeError, NotImplementedError) as error:
        raise SelfTestError(
            f"directions cannot share a pass through this model ({error}); set client.directions-at-once = 1"
        ) from error
    largest = max(map(abs, alone))
    if any(abs(a - b) > tolerance * largest for a, b in zip(alone, together, strict=True)):
        raise SelfTestError(
            f"two directions have slopes {together} in one pass, {alone} in a pass each; "
            "set client.directions-at-once = 1"
        )


def _slope(objective: Objective, point: Tensors, probe: Tensors, slopes: SlopeRule) -> float | None:
    """None where the loss has no tangent, or an operation says that it has no forward derivative."""
    try:
        return slopes([Part(objective, 1.0)], point, [probe])[1][0]
    except (ForwardModeError, NotImplementedError) as error:
        if torch.is_inference_mode_enabled():
            raise SelfTestError(str(error)) from error
        return None


def _agree(slope: float | None, reference: _Reference, tolerance: float) -> bool:
    if slope is None:  # right only for a tensor that the model does not read
        return reference.slope == 0
    return abs(slope - reference.slope) <= reference.error + tolerance * max(abs(slope), abs(reference.slope))


def _difference(
    objective: Objective, point: Tensors, probe: Tensors, rounding: float, slope: float | None, tolerance: float
) -> _Reference:
    """The most certain of the central differences down the ladder: the one least changed by the last halving.

    Stops early where one agrees with `slope`: a wrong slope meets a difference only by a rare chance.
    """
    found: list[_Reference] = []
    before: float | None = None
    for step in LADDER:
        now = central_difference(step)([Part(objective, 1.0)], point, [probe])[1][0]
        exact = _Reference(now, 0.0)
        if slope is None or _agree(slope, exact, tolerance / 2):
            return exact
        if before is not None:
            found.append(_Reference(now, abs(now - before) + rounding / step))
        before = now
    return min(found, key=lambda reference: reference.error)


def _kinds(params: Tensors) -> dict[str, list[str]]:
    """Names alike but for numbers: the head's large slopes would hide a LoRA matrix that lost its own."""
    kinds: dict[str, list[str]] = {}
    for name in params:
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    return kinds


def _nonzero(name: str, tensor: Tensor, seed: int) -> Tensor:
    """LoRA's B starts at zero, where the slope along A is zero whether or not forward mode works."""
    if tensor.count_nonzero():
        return tensor.detach()
    return 0.02 * direction(Seed(seed, 0, 0, 0), TRIES, {name: tensor})[name].to(tensor)


def _probe(point: Tensors, names: list[str], seed: int, k: int) -> Tensors:
    drawn = direction(Seed(seed, 0, 0, 0), k, {name: point[name] for name in names})
    return {name: v * wide(point[name]).square().mean().sqrt().cpu() for name, v in drawn.items()}


def _coarsest_eps(params: Tensors, module: nn.Module | None) -> float:
    formats = {tensor.dtype for tensor in params.values()}
    for part in [] if module is None else module.modules():
        formats |= {tensor.dtype for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))}
        formats.add(getattr(part, "compute_dtype", None) or torch.float64)  # 4-bit layers compute in another format
    return max(torch.finfo(dtype).eps for dtype in formats if dtype.is_floating_point)


def _loss(objective: Objective, params: Tensors, eps: float) -> float:
    with torch.no_grad():
        first, second = (float(objective(params)) for _ in range(2))
    if not abs(first - second) <= ROUNDING * eps * max(1.0, abs(first)):
        raise SelfTestError(
            f"two losses with the same parameters and examples are {first:.6g} and {second:.6g}: they must be equal. "
            "Turn dropout off (model.eval(), adapter.dropout = 0) or fix its state, and look for NaN"
        )
    return abs(first)
