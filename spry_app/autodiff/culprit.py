"""Which module loses or spoils the tangent: hooks watch the modules while a slope is measured. For a self-test that has
failed; no slope is judged here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spry_app.autodiff.directions import Tensors
from spry_app.autodiff.duals import Pair, split
from spry_app.autodiff.slopes import ForwardModeError, Objective, Part, SlopeRule, moved

SAMPLE = 4096
"""Elements kept of a tensor, evenly spaced: enough to judge it without keeping every activation."""


@dataclass(frozen=True)
class _Call:
    """One finished call of a module: samples of what went in and came out."""

    name: str
    module: nn.Module
    inputs: list[Pair]
    outputs: list[Pair]
    forward_mode_is_on: bool


CAUSES: tuple[tuple[Callable[[_Call], bool], str], ...] = (
    (
        lambda call: not call.forward_mode_is_on,
        "forward mode is switched off there, as by reentrant activation checkpointing and by torch.inference_mode(); "
        "turn checkpointing off, use torch.no_grad()",
    ),
    (
        lambda call: type(call.module).__module__.startswith("bitsandbytes"),
        "its quantised kernel has no forward derivative; quantise with the run-config key model.quantization, whose "
        "layers dequantise and then multiply",
    ),
    (
        lambda call: True,
        "one of its own operations has no forward derivative (reentrant activation checkpointing, a custom kernel or "
        "autograd.Function, .detach(), .data, numpy); write it with PyTorch's operations",
    ),
)


def find_culprit(
    objective: Objective,
    params: Tensors,
    probe: Tensors,
    module: nn.Module | None,
    slopes: SlopeRule,
    eps: float,
) -> str:
    """A sentence on the first module whose output has a wrong tangent though those that entered it are right.

    Tangents are held against central differences of the same tensors; `eps` is the rounding of the number format.
    """
    step = eps ** (1 / 3)  # balances rounding and curvature, `probe` being in units of each tensor's size
    if module is None:
        return "No module was given to self_test, so the one at fault is not known."
    measured = _watch(module, lambda: slopes([Part(objective, 1.0)], params, [probe]))
    above = _watch(module, lambda: objective(moved(params, probe, step)))
    below = _watch(module, lambda: objective(moved(params, probe, -step)))
    for call, up, down in zip(measured, above, below, strict=False):
        came_in = _right(call.inputs, up.inputs, down.inputs, step, eps)
        if came_in and not _right(call.outputs, up.outputs, down.outputs, step, eps):
            return _verdict(call)
    if len(measured) < len(above):  # that one raised, and never finished
        return _verdict(above[len(measured)])
    return "No single module is at fault: look at what the objective does outside of the model, or at the slope rule."


def _verdict(call: _Call) -> str:
    cause = next(text for applies, text in CAUSES if applies(call))
    return f"The tangent goes wrong in {call.name!r} ({type(call.module).__name__}): {cause}."


def _right(measured: list[Pair], above: list[Pair], below: list[Pair], step: float, eps: float) -> bool:
    """Whether tangents agree with differences, generously: a lost one is off by its whole length."""
    for (_, tangent), (up, _), (down, _) in zip(measured, above, below, strict=True):
        slope = (up - down) / (2 * step)
        got = torch.zeros_like(slope) if tangent is None else tangent
        allowed = 0.2 * max(slope.norm(), got.norm()) + eps * up.norm() / step
        if (got - slope).norm() > allowed:
            return False
    return True


def _watch(module: nn.Module, run: Callable[[], object]) -> list[_Call]:
    """Every call of every module inside `module`, in the order in which they finish: the inner before the outer."""
    calls: list[_Call] = []

    def hook_for(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs, outputs = ([_sample(tensor) for tensor in _tensors(tree)] for tree in ((args, kwargs), output))
            on = torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()
            calls.append(_Call(name, part, inputs, outputs, on))

        return hook

    with ExitStack() as hooks, suppress(ForwardModeError, NotImplementedError), torch.no_grad():
        for name, part in module.named_modules():
            handle = part.register_forward_hook(hook_for(name or "the model"), with_kwargs=True)
            hooks.callback(handle.remove)
        run()
    return calls


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield tree
    elif isinstance(tree, Mapping):
        yield from _tensors(tuple(tree.values()))
    elif isinstance(tree, tuple | list):
        for branch in tree:
            yield from _tensors(branch)


def _sample(tensor: Tensor) -> Pair:
    def some(values: Tensor) -> Tensor:
        return values.detach().flatten()[:: max(1, values.numel() // SAMPLE)].double()

    primal, tangent = split(tensor)
    return some(primal), None if tangent is None else some(tangent)
