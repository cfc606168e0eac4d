"""A client's tensors while it trains, and what of them goes up. Where estimates come from is not decided here."""

from collections.abc import Set

import torch

from spry_app.autodiff.directions import Tensors
from spry_app.autodiff.gradients import Estimate
from spry_app.methods import Method
from spry_app.optimizers import NamedOptimizer


class LocalTraining:
    """Takes one estimate after the other: each is a step, or is averaged where the gradient itself goes up.

    optimizer: over the tensors that this client trains, as they were sent. loss: summed over the examples taken.
    forwards: what the estimates cost, in passes of one example.
    """

    def __init__(self, optimizer: NamedOptimizer, method: Method) -> None:
        self._reply = method.reply
        self._optimizer = optimizer
        self._total = {name: torch.zeros_like(value) for name, value in optimizer.tensors.items()}
        self._slopes: list[tuple[float, ...]] = []
        self.loss, self.examples, self.forwards = 0.0, 0, 0.0

    @property
    def steps(self) -> int:
        """Estimates taken so far."""
        return len(self._slopes)

    @property
    def tensors(self) -> Tensors:
        """The current values: those that were sent, after the steps so far."""
        return self._optimizer.tensors

    def take(self, estimate: Estimate, examples: int, forwards: float) -> None:
        """One batch's estimate of the gradient at `tensors`, and its cost."""
        self.forwards += forwards
        self.loss, self.examples = self.loss + estimate.loss * examples, self.examples + examples
        self._slopes.append(estimate.slopes)
        if self._reply != "gradient":
            self._optimizer.step(estimate.gradient)
            return
        for name, value in estimate.gradient.items():
            self._total[name].add_(value, alpha=examples)

    def outgoing(self, exact: Set[str]) -> Tensors:
        """Tensors of the reply: values, the mean gradient over all examples, or only what no scalar stands for."""
        if self._reply == "gradient":
            return {name: value / self.examples for name, value in self._total.items()}
        sent = sorted(exact) if self._reply == "slopes" else list(self.tensors)
        return {name: self.tensors[name].clone() for name in sent}

    def slopes(self, exact: Set[str]) -> tuple[tuple[float, ...], ...]:
        """Scalars of the reply: of every step, or none where nothing is rebuilt from them."""
        return tuple(self._slopes) if self._reply == "slopes" and self.tensors.keys() - exact else ()
