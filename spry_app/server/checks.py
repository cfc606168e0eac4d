"""Is a reply fit to be averaged? Names, shapes, finite numbers, and nothing that was not asked for."""

import math
from collections.abc import Mapping

import torch

from spry_app.autodiff.costs import Cost
from spry_app.autodiff.gradients import Gradient
from spry_app.protocol import Tensors, TrainReply


def problem(reply: TrainReply, asked: Mapping[str, torch.Tensor], steps: int, slopes: int, most: float) -> str:
    """Why the reply must be refused; empty if it is fine.

    asked: the tensors that must come as they are. steps, slopes: the sizes of the scalars that must come (0 steps:
    none). most: forward passes that an example can have taken in a step.
    """
    if not math.isfinite(reply.loss):
        return f"its loss is {reply.loss}"
    if not math.isfinite(reply.peak_mib + reply.seconds) or (
        reply.personal is not None and reply.personal.examples < 1
    ):
        return f"its measurements are impossible: peak {reply.peak_mib} MiB, {reply.seconds} s, score {reply.personal}"
    if reply.examples < 1:
        return f"it was trained on {reply.examples} examples"
    # None at all where a head is trained on hidden states that were at hand.
    if not 0 <= reply.forwards <= reply.examples * most * (1 + 1e-6):
        return f"its {reply.examples} examples cannot have taken {reply.forwards} forward passes"
    return _tensor_problem(reply.tensors, asked) or _slope_problem(reply, steps, slopes)


def most_forwards(gradient: Gradient, directions: int) -> float:
    """Passes of one example in a step at the most: no direction shares one, and head and prefix take one each."""
    return (gradient.cost(directions, 1) + Cost(passes=2)).forwards(suffix=1.0)


def _tensor_problem(tensors: Tensors, asked: Mapping[str, torch.Tensor]) -> str:
    missing, extra = sorted(asked.keys() - tensors.keys()), sorted(tensors.keys() - asked.keys())
    if missing or extra:
        return f"tensors missing: {missing or 'none'}; not asked for: {extra or 'none'}"
    for name, value in tensors.items():
        if value.shape != asked[name].shape or value.dtype != asked[name].dtype:
            got, want = f"{tuple(value.shape)} {value.dtype}", f"{tuple(asked[name].shape)} {asked[name].dtype}"
            return f"{name} is {got}, not {want}"
        if not torch.isfinite(value).all():
            return f"{name} has a number that is not finite"
    return ""


def _slope_problem(reply: TrainReply, steps: int, slopes: int) -> str:
    if len(reply.slopes) != steps or any(len(step) != slopes for step in reply.slopes):
        got = [len(step) for step in reply.slopes]
        return f"it holds {got} slopes a step; asked for were {steps} steps of {slopes}"
    if not all(math.isfinite(slope) for step in reply.slopes for slope in step):
        return "a slope is not finite"
    return ""
