"""Can a gradient of this node's model be trusted? Asked before anything is trained on it; nothing is trained here."""

import logging
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch.nn import Module

from spry_app.autodiff.directions import Seed, Tensors, direction
from spry_app.autodiff.gradients import GRADIENTS, Gradient
from spry_app.autodiff.self_check import SelfTestError, disagreement, self_test, shared_pass_test
from spry_app.autodiff.slopes import Batch, forward_mode, moved
from spry_app.client.node import Node
from spry_app.errors import SpryError
from spry_app.models import NoPrefixError
from spry_app.objectives import batch_of, objective

logger = logging.getLogger(__name__)

_BISECTED = GRADIENTS["bisected-backprop"]
_trusted: WeakKeyDictionary[Module, bool] = WeakKeyDictionary()
"""Models that passed, and whether directions that share a pass were tested too."""
_bisected: WeakKeyDictionary[Module, str] = WeakKeyDictionary()
"""Models that were passed block by block for a trial, and why that fails; empty where it does not."""
_cuts: WeakKeyDictionary[Module, dict[int, str]] = WeakKeyDictionary()
"""Blocks at which a model was cut for a trial, and why that fails; empty where it does not."""

MOVE = 0.1
"""Step of that trial: far above rounding."""


def check_gradient(node: Node, gradient: Gradient, at_once: int) -> None:
    """Raises SpryError where `gradient` would be wrong on this model as loaded, or would not do what it promises.

    at_once: how many directions may come to share a pass.
    """
    if gradient.slopes is forward_mode:
        _check_forward_mode(node, at_once)
    if gradient is GRADIENTS["checkpointed-backprop"] and not node.adapted.blocks:
        raise SpryError(
            f"The blocks of this {node.adapted.model.config.model_type} model are not known, so nothing of it could be "
            'forgotten and computed again: set gradient to "backprop" or "forward-mode".'
        )
    if gradient is _BISECTED:
        _check_bisected(node)
    if gradient.cut is not None:
        _check_cut(node, gradient.cut)


def trusted(node: Node, own: Gradient, at_once: int, every: bool = False) -> tuple[str, ...]:
    """Names of the gradients of the table that a task may have here. Forward mode and bisected backpropagation are
    among them where they were tested, which takes some passes: where one is the method's `own`, or `every` one may be
    asked for. Differences are what they are tested against, and plain backpropagation is PyTorch's own: they would take
    memory, and are not tested.
    """
    found = []
    for name, gradient in GRADIENTS.items():
        tried = gradient.slopes is forward_mode or gradient is _BISECTED
        if every or not tried or gradient is own or (gradient.slopes and gradient.slopes is own.slopes):
            try:
                check_gradient(node, gradient, at_once)
            except SpryError as error:
                logger.warning("This node does not offer gradient=%r: %s", name, error)
            else:
                found.append(name)
    return tuple(found)


def _check_cut(node: Node, cut: int) -> None:
    """That the two halves make up the whole, with all tensors moved; tried once a process."""
    known = _cuts.setdefault(node.adapted.model, {})
    if cut not in known:
        known[cut] = _cut_problem(node, cut)
    if known[cut]:
        raise SpryError(
            f"This {node.adapted.model.config.model_type} model cannot be cut at block {cut} ({known[cut]}): set "
            'client.cut to another block, adapter.bias to "none", adapter.subspace to "none" or "core", or method to '
            '"fedmezo", which needs no cut.'
        )


@torch.no_grad()
def _cut_problem(node: Node, cut: int) -> str:
    adapted, inputs = node.adapted, node.train.inputs(range(min(2, len(node.train))))
    depths, here = adapted.depths(), adapted.tensors()
    v = direction(Seed(run=0, round=0, client=0, step=0), 0, here)
    low, high = (moved(here, {n: v[n] for n in here if (depths[n] < cut) is side}, MOVE) for side in (True, False))
    whole = adapted.features(moved(here, v, MOVE), inputs)
    try:
        joined = adapted.features(high, inputs, adapted.prefix(inputs, cut, low))
    except NoPrefixError as error:
        return str(error)
    close = torch.allclose(whole, joined, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
    return "" if close else "what happens above it depends on more than its hidden states"


def _check_bisected(node: Node) -> None:
    """That blocks passed one by one give the gradient of the whole model, by its differences; tried once a process."""
    model = node.adapted.model
    if model not in _bisected:
        _bisected[model] = _bisection_problem(node)
    if _bisected[model]:
        raise SpryError(
            f"This {model.config.model_type} model cannot be passed block by block ({_bisected[model]}): set gradient "
            'to "checkpointed-backprop", "backprop" or "forward-mode".'
        )


def _bisection_problem(node: Node) -> str:
    adapted, seed = node.adapted, Seed(run=0, round=0, client=0, step=0)
    if not adapted.blocks:
        return "its blocks are not known"

    def slopes(
        batch: Batch, params: Tensors, directions: Iterable[Tensors], at_once: int = 1
    ) -> tuple[float, list[float]]:
        parts = batch_of(adapted, node.train, [0], 0, seed)  # of what `batch` has as a whole
        found = _BISECTED.estimate(parts, params, seed, 1, 1)
        along = [sum(float((v[name] * found.gradient[name]).sum()) for name in v) for v in directions]
        return found.loss, along

    one = objective(adapted, node.train, [0], seed)
    try:
        return str(disagreement(one, adapted.tensors(), adapted.model, slopes=slopes) or "")
    except (NoPrefixError, SelfTestError) as error:
        return str(error)


def _check_forward_mode(node: Node, at_once: int) -> None:
    """Self-test of the model, once a process."""
    model = node.adapted.model
    shared = at_once > 1
    if model in _trusted and (_trusted[model] or not shared):
        return
    few = objective(node.adapted, node.train, range(min(2, len(node.train))), Seed(run=0, round=0, client=0, step=0))
    try:
        self_test(few, node.adapted.tensors(), model)
        if shared:
            shared_pass_test(few, node.adapted.tensors(), model)
    except SelfTestError as error:
        raise SpryError(f"Self-test of forward mode failed: {error}") from error
    _trusted[model] = shared
