"""Update rules over named tensors, for clients and server alike. torch.optim where it has the rule, FedOpt's beside it.

A tensor that got no gradient keeps its value and its moments. Nothing here knows rounds, clients or messages.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from spry_app.autodiff.directions import Tensors
from spry_app.errors import SpryError

SecondMoment = Callable[[Tensor, Tensor, float], Tensor]
"""(v, squared gradient, beta2) -> next v."""

SECOND_MOMENTS: dict[str, SecondMoment] = {
    "adagrad": lambda v, square, beta2: v + square,
    "adam": lambda v, square, beta2: beta2 * v + (1 - beta2) * square,
    "yogi": lambda v, square, beta2: v - (1 - beta2) * square * torch.sign(v - square),
}


class FedOpt(torch.optim.Optimizer):
    """Adaptive step on a pseudo-gradient (arXiv:2003.00295, Algorithm 2): no bias correction, v starts at tau^2."""

    def __init__(self, params: Any, moment: str, lr: float, beta1: float, beta2: float, tau: float) -> None:
        super().__init__(params, {"moment": moment, "lr": lr, "beta1": beta1, "beta2": beta2, "tau": tau})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            next_moment, beta1, tau = SECOND_MOMENTS[group["moment"]], group["beta1"], group["tau"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(param), torch.full_like(param, tau**2)
                state["m"] = beta1 * state["m"] + (1 - beta1) * param.grad
                state["v"] = next_moment(state["v"], param.grad.square(), group["beta2"])
                param.sub_(group["lr"] * state["m"] / (state["v"].sqrt() + tau))


@dataclass(frozen=True)
class Rule:
    """A row of hyper-parameters: which rule, and its numbers (those that a rule has no use for are ignored)."""

    name: str
    learning_rate: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3


Groups = list[dict[str, Any]]
"""torch.optim's parameter groups: "params", and "lr" where a group has its own."""
Make = Callable[[Groups, Rule], torch.optim.Optimizer]


def _adaptive(groups: Groups, rule: Rule) -> torch.optim.Optimizer:
    return FedOpt(groups, rule.name, rule.learning_rate, rule.beta1, rule.beta2, rule.tau)


def _average(groups: Groups, rule: Rule) -> torch.optim.Optimizer:
    return torch.optim.SGD([param for group in groups for param in group["params"]], 1.0)


CLIENT_OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda groups, rule: torch.optim.SGD(groups, rule.learning_rate, weight_decay=rule.weight_decay),
    "adam": lambda groups, rule: torch.optim.Adam(groups, rule.learning_rate, weight_decay=rule.weight_decay),
    "adamw": lambda groups, rule: torch.optim.AdamW(groups, rule.learning_rate, weight_decay=rule.weight_decay),
}
SERVER_OPTIMIZERS: dict[str, Make] = {
    "average": _average,
    "sgd": lambda groups, rule: torch.optim.SGD(groups, rule.learning_rate),
    "momentum": lambda groups, rule: torch.optim.SGD(groups, rule.learning_rate, momentum=rule.beta1),
    "adagrad": _adaptive,
    "adam": _adaptive,
    "yogi": _adaptive,
}


class NamedOptimizer:
    """A torch optimizer over named tensors (fp32, CPU), which it owns: it starts from copies of `tensors`.

    learning_rates: step sizes of single tensors, instead of the rule's.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        table: Mapping[str, Make],
        rule: Rule,
        learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        own = learning_rates or {}
        self._params = {name: Parameter(value.detach().clone()) for name, value in tensors.items()}
        groups: Groups = [{"params": [param for name, param in self._params.items() if name not in own]}]
        groups += [{"params": [self._params[name]], "lr": rate} for name, rate in own.items()]
        self._optimizer = table[rule.name](groups, rule)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]

    @property
    def tensors(self) -> Tensors:
        """The current values, by name; shared with the optimizer, so copy what must not change."""
        return {name: param.detach() for name, param in self._params.items()}

    def step(
        self, gradient: Mapping[str, Tensor], parts: Mapping[str, float] | None = None, scale: float = 1.0
    ) -> None:
        """Step the tensors named in `gradient`; the others and their moments stay as they are.

        parts: of its step, what a tensor takes; all of it where none is given. scale: part of all step sizes.
        Moments depend on neither.
        """
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = scale * rate
        self._optimizer.zero_grad(set_to_none=True)
        for name, value in gradient.items():
            self._params[name].grad = value
        shorter = {name: part for name, part in (parts or {}).items() if name in gradient and part != 1}
        before = {name: self._params[name].detach().clone() for name in shorter}
        self._optimizer.step()
        for name, part in shorter.items():  # one rounded operation at a time, the same on every machine
            self._params[name].data.sub_(before[name]).mul_(part).add_(before[name])

    @property
    def moments(self) -> Tensors:
        """What the rule remembers besides, as "kind/name of the tensor"; nothing for a rule without memory."""
        return {
            f"{kind}/{name}": value
            for name, param in self._params.items()
            for kind, value in self._optimizer.state.get(param, {}).items()
            if isinstance(value, Tensor)
        }

    def load(self, tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor] | None = None) -> None:
        """Copy values of some tensors and, if given, all that the rule remembers. Raises SpryError for those of another
        model; nothing is copied then.
        """
        named = [*tensors.items(), *((key.partition("/")[2], value) for key, value in (moments or {}).items())]
        for name, value in named:
            own = self._params.get(name)
            if own is None or own.shape != value.shape or own.dtype != value.dtype:
                raise SpryError(
                    f"{name[:200]!r} of shape {tuple(value.shape)}, {value.dtype}, is no tensor that this "
                    "model trains; it is of another model.name or adapter.*."
                )
        for name, value in tensors.items():
            self._params[name].data.copy_(value)
        if moments is None:
            return
        self._optimizer.state.clear()
        for key, value in moments.items():
            kind, _, name = key.partition("/")
            self._optimizer.state[self._params[name]][kind] = value.clone()
