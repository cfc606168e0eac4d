"""The methods by name, and the way to bring one's own. A new method is a new row."""

import dataclasses
from typing import Any

from spry_app.autodiff.gradients import GRADIENTS, central, one_sided
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods.assignment import Assign, Deal, Pace, Share, StepMemory, cyclic_split, depth_split, every_unit
from spry_app.methods.by_device import by_device
from spry_app.methods.fit import Layout, as_it_is, cut_in_two
from spry_app.methods.method import Method
from spry_app.methods.pick import NEAREST
from spry_app.plugins import look_up

_FORWARD, _BACKPROP = GRADIENTS["forward-mode"], GRADIENTS["backprop"]
_CENTRAL, _ONE_SIDED = GRADIENTS["central-difference"], GRADIENTS["one-sided-difference"]
_SPRY, _FEDAVG, _FEDYOGI = "SPRY, arXiv:2405.15551", "FedAvg, arXiv:1602.05629", "FedYogi, arXiv:2003.00295"

ASSIGNMENTS: dict[str, Assign] = {
    "every-unit": every_unit,
    "cyclic": cyclic_split,
    "by-depth": depth_split,
    "by-device": by_device,
}
BY_MEMORY = frozenset({by_device})
"""Assignments that deal out what a node's memory holds: each share has slices of its own then, and no others."""

AUTO = "auto"
"""`gradient` that is chosen for the nodes of a run."""

METHODS: dict[str, Method] = {
    "spry": Method(gradient=_FORWARD, assign=cyclic_split, server_optimizer="yogi", paper=_SPRY),
    "spry-per-iteration": Method(
        gradient=_FORWARD, assign=cyclic_split, reply="slopes", send="log", server_optimizer="yogi", paper=_SPRY
    ),
    "fedfgd": Method(gradient=_FORWARD, server_optimizer="yogi", paper=f"FedFGD, without the split of {_SPRY}"),
    "fedavg": Method(gradient=_BACKPROP, paper=_FEDAVG),
    "fedavg-split": Method(gradient=_BACKPROP, assign=cyclic_split, paper=f"{_FEDAVG}, with the split of {_SPRY}"),
    "fedyogi": Method(gradient=_BACKPROP, server_optimizer="yogi", paper=_FEDYOGI),
    "fedyogi-split": Method(
        gradient=_BACKPROP,
        assign=cyclic_split,
        server_optimizer="yogi",
        paper=f"{_FEDYOGI}, with the split of {_SPRY}",
    ),
    "fedsgd": Method(
        gradient=_BACKPROP, reply="gradient", server_optimizer="sgd", paper="FedSGD, arXiv:1602.05629, section 2"
    ),
    "fedmezo": Method(gradient=_CENTRAL, paper="FedMeZO, arXiv:2402.05926, after MeZO, arXiv:2305.17333"),
    # Our reading: each client draws directions of its own; the paper lets all clients share them.
    "baffle": Method(gradient=_ONE_SIDED, reply="slopes", paper="BAFFLE, arXiv:2301.12195"),
    "fwdllm": Method(gradient=central(1e-2), pick=NEAREST, paper="FwdLLM, arXiv:2308.13894"),
    # Our reading: normal directions and the h that goes with them, where the paper draws unit vectors.
    "fedzo": Method(gradient=_ONE_SIDED, paper="FedZO, arXiv:2201.09531"),
    "decomfl": Method(
        gradient=one_sided(1e-3), reply="slopes", send="log", seeds="shared", paper="DeComFL, arXiv:2405.15861"
    ),
    "fedspzo": Method(gradient=_CENTRAL, fit=cut_in_two(1e-3), reply="slopes", paper="FedSPZO, arXiv:2502.10239v2"),
}


def get_method(config: RunConfig) -> Method:
    """The Method of a run: `method` names it; `gradient`, `assign`, `directions`, `send` and `server.optimizer` replace
    one choice of its row each; gradient "auto" none, for what is chosen later comes with the tasks (Method.taking).
    """
    changes: dict[str, Any] = {}
    if config.gradient:
        changes["fit"] = as_it_is
    if config.gradient in GRADIENTS:
        changes["gradient"] = GRADIENTS[config.gradient]
    if config.assign:
        changes["assign"] = ASSIGNMENTS[config.assign]
    if config.directions:
        changes["directions"] = config.directions
    if config.send:
        changes["send"] = config.send
    if config.server.optimizer:
        changes["server_optimizer"] = config.server.optimizer
    try:
        method = dataclasses.replace(_find(config.method), **changes)
    except ValueError as error:
        keys = f"gradient={config.gradient!r}, directions={config.directions!r}, send={config.send!r}"
        raise SpryError(
            f"method={config.method!r} with {keys} and server.optimizer={config.server.optimizer!r}: {error}"
        ) from None
    if method.seeds == "shared" and config.client.optimizer != "sgd":
        raise SpryError(
            f"client.optimizer={config.client.optimizer!r}: method={config.method!r} averages what clients measured "
            'along shared directions, which stands for the mean of their steps only with client.optimizer="sgd".'
        )
    if method.assign in BY_MEMORY and method.reply == "slopes":
        raise SpryError(
            f"assign={config.assign!r}: clients of method={config.method!r} reply with slopes, from which the server "
            "repeats their steps, so their gradients must be of one kind. Use a method whose clients reply with "
            'weights or a gradient (method="spry", "fedavg", "fedsgd"), or assign="by-depth".'
        )
    if method.assign in BY_MEMORY and config.gradient == AUTO:
        raise SpryError(
            f'gradient="auto" chooses one gradient for all clients, and assign={config.assign!r} one for each: leave '
            'gradient "", or set assign to "every-unit", "cyclic" or "by-depth".'
        )
    _check_weighting(config, method)
    _check_late_replies(config, method)
    _check_privacy(config, method)
    return method


def is_dealt(config: RunConfig, method: Method) -> bool:
    """Whether a client learns only with its task which gradient it takes, after all nodes have said what they can."""
    return config.gradient == AUTO or method.assign in BY_MEMORY


def _check_weighting(config: RunConfig, method: Method) -> None:
    if config.server.weighting == "examples":
        return
    if method.reply == "slopes":
        raise SpryError(
            f"server.weighting={config.server.weighting!r}: clients of method={config.method!r} reply with slopes, and "
            "whoever rebuilds the run from their log would not know the weights, which follow from all earlier rounds. "
            'Use server.weighting="examples", or a method whose clients reply with weights or a gradient '
            '(method="spry").'
        )
    if config.privacy.mode:
        raise SpryError(
            f"server.weighting={config.server.weighting!r}: with privacy.mode={config.privacy.mode!r} weights would "
            "tell of replies without noise, or take noise that was added for a gradient's own. Use "
            'server.weighting="examples", or privacy.mode="".'
        )


def _check_late_replies(config: RunConfig, method: Method) -> None:
    if config.server.late_replies == "drop":
        return
    if method.reply == "slopes":
        raise SpryError(
            f"server.late-replies={config.server.late_replies!r}: clients of method={config.method!r} reply with "
            "slopes, from which server, clients and log repeat steps at the tensors of one round, and a late reply was "
            'measured at those of another. Use server.late-replies="drop", or a method whose clients reply with '
            'weights or a gradient (method="spry").'
        )
    if config.privacy.mode:
        raise SpryError(
            f"server.late-replies={config.server.late_replies!r}: with privacy.mode={config.privacy.mode!r} a client "
            "counts by the rounds that it was asked in, and a late reply would enter another. Use "
            'server.late-replies="drop", or privacy.mode="".'
        )


def _check_privacy(config: RunConfig, method: Method) -> None:
    if config.privacy.unit == "example" and config.gradient == AUTO:
        raise SpryError(
            "privacy.unit='example' counts what a row says by one kind of gradient, and gradient=\"auto\" leaves open "
            'which: name the gradient, or set privacy.unit="client".'
        )
    if config.privacy.mode == "central" and (method.send, method.seeds) == ("log", "own"):
        raise SpryError(
            f"privacy.mode='central': method={config.method!r} sends every client the slopes of each other one "
            '(send="log"), measured along directions of its own, so no sum of them could carry the noise. Use '
            'privacy.mode="local", or send="weights", or method="decomfl", whose clients share their directions.'
        )
    threshold = config.client.variance_threshold
    if config.privacy.unit == "example" and method.pick.needs_update and threshold:
        raise SpryError(
            f"privacy.unit='example': method={config.method!r} uses as many directions as the rows' own slopes ask for "
            f"(client.variance-threshold={threshold:g}), which tells of them without noise. Set "
            'client.variance-threshold=0, which always uses client.directions, or privacy.unit="client".'
        )


def _find(name: str) -> Method:
    """A row of the table, or the Method at "package.module:object"."""
    method = look_up(name, METHODS, "method")
    if not isinstance(method, Method):
        raise SpryError(f"method={name!r} is a {type(method).__name__}; it must be a spry_app.methods.Method.")
    return method


__all__ = [
    "ASSIGNMENTS",
    "AUTO",
    "BY_MEMORY",
    "METHODS",
    "Deal",
    "Layout",
    "Method",
    "Pace",
    "Share",
    "StepMemory",
    "get_method",
    "is_dealt",
]
