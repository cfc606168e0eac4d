"""The methods by name, and the way to bring one's own. A new method is a new row."""

import dataclasses
import difflib
from importlib import import_module
from typing import Any

from spry_app.autodiff.gradients import GRADIENTS
from spry_app.errors import SpryError
from spry_app.methods.assignment import cyclic_split
from spry_app.methods.method import Method

_SPRY = Method(
    gradient=GRADIENTS["forward-mode"],
    assign=cyclic_split,
    reply="weights",
    server_optimizer="yogi",
    paper="SPRY, arXiv:2405.15551",
)

METHODS: dict[str, Method] = {
    "spry": _SPRY,
    "spry-per-iteration": dataclasses.replace(_SPRY, reply="slopes"),
    "fedavg": Method(gradient=GRADIENTS["backprop"], paper="FedAvg, arXiv:1602.05629"),
    "fedyogi": Method(gradient=GRADIENTS["backprop"], server_optimizer="yogi", paper="FedYogi, arXiv:2003.00295"),
}


def get_method(name: str, gradient: str = "", server_optimizer: str = "") -> Method:
    """A row of the table, or the Method at "package.module:object"; the other keys replace a choice of it."""
    if ":" in name:
        method = load_object(name, "method")
        if not isinstance(method, Method):
            raise SpryError(f"method={name!r} is a {type(method).__name__}; it must be a spry_app.methods.Method.")
    elif name in METHODS:
        method = METHODS[name]
    else:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SpryError(f'method={name!r} is not known.{hint} Known: {", ".join(METHODS)}, or "package.module:object".')
    changes: dict[str, Any] = {"gradient": GRADIENTS[gradient]} if gradient else {}
    if server_optimizer:
        changes["server_optimizer"] = server_optimizer
    try:
        return dataclasses.replace(method, **changes)
    except ValueError as error:
        raise SpryError(f"method={name!r} with gradient={gradient!r}: {error}") from None


def load_object(path: str, key: str) -> Any:
    """Import "package.module:object"; `key` is the run-config key it came from."""
    module, _, attribute = path.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SpryError(f'{key}={path!r} cannot be imported ({error}). It must be "package.module:object".') from error


__all__ = ["METHODS", "Method", "get_method", "load_object"]
