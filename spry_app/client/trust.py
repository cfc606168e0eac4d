"""Can a gradient of this node's model be trusted? Asked before anything is trained on it; nothing is trained here."""

from weakref import WeakKeyDictionary

from torch.nn import Module

from spry_app.autodiff.directions import Seed
from spry_app.autodiff.gradients import GRADIENTS, Gradient
from spry_app.autodiff.self_check import SelfTestError, self_test, shared_pass_test
from spry_app.autodiff.slopes import forward_mode
from spry_app.client.node import Node
from spry_app.errors import SpryError
from spry_app.objectives import objective

_trusted: WeakKeyDictionary[Module, bool] = WeakKeyDictionary()
"""Models that passed, and whether directions that share a pass were tested too."""


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
