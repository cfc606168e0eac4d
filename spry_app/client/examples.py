"""One local step in a run that protects each example: what every row says by itself, bounded, summed, with noise. What
is made of the step is made elsewhere, and tells no more.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch

from spry_app.autodiff.directions import Seed, Tensors
from spry_app.autodiff.gradients import Estimate, Gradient
from spry_app.autodiff.slopes import Batch
from spry_app.client.privacy import own_secret
from spry_app.config import PrivacyConfig, RunConfig
from spry_app.privacy import Secret, bounded, noisy
from spry_app.protocol import Task


def by_example(task: Task, rows: int, config: RunConfig) -> "ByExample | None":
    """For the steps of a task on a node with so many rows; None where clients are protected as a whole, or not at all.

    A batch is divided by `client.batch-size` even where it is the shorter last one of a pass: dividing by less would
    need more noise, and a row weighs the same in whichever batch it is.
    """
    if config.privacy.unit != "example":
        return None
    about = ("step", config.seed, task.round, task.client)
    return ByExample(config.privacy, own_secret(), about, min(config.client.batch_size, rows))


@dataclass(frozen=True)
class ByExample:
    """The Gaussian mechanism on a batch (DP-SGD, arXiv:1607.00133, algorithm 1, on slopes as on gradients).

    secret: of this node. about: what the noise is for. size: what the sum over the rows is divided by.
    """

    privacy: PrivacyConfig
    secret: Secret
    about: tuple[str | int, ...]
    size: int

    def estimate(
        self,
        of: Callable[[Batch], Estimate],
        batch: Batch,
        gradient: Gradient,
        exact: Collection[str],
        params: Tensors,
        seed: Seed,
    ) -> Estimate:
        """The batch's estimate from those of its rows; one row in place of another moves slopes and exact gradient by
        2 clip / size at the most, and each of their numbers has noise of noise-multiplier clip / size.

        of: the estimate of a batch, by `gradient` and for `exact` by backpropagation, at `params`. batch: a row a part.
        Slopes are those that a server can rebuild the rest of the gradient from, to the bit. The loss is as it is: it
        must not leave the node.
        """
        direct = [name for name in params if gradient.slopes is None or name in exact]
        slopes, known = _Sum(self.privacy.clip_slopes), _Sum(self.privacy.clip)
        losses = []
        for part in batch:
            found = of([replace(part, weight=1.0)])
            losses.append(found.loss)
            known.add({name: found.gradient[name] for name in direct})
            slopes.add({"slopes": torch.tensor(found.slopes, dtype=torch.float64)} if found.slopes else {})
        told = tuple(value for each in self._told(slopes, "slopes", seed).values() for value in each.tolist())
        total = {name: value.float() for name, value in self._told(known, "gradient", seed).items()}
        rest = {name: value for name, value in params.items() if name not in direct}
        total |= gradient.combine(told, seed, rest) if rest else {}
        mean_loss = sum(losses) / len(losses)
        return Estimate(mean_loss, {name: total[name] for name in params}, told, found.cost)

    def _told(self, total: "_Sum", kind: str, seed: Seed) -> Tensors:
        mean = {name: value / self.size for name, value in total.values.items()}
        std = self.privacy.noise_multiplier * total.most / self.size
        return noisy(mean, std, self.secret, kind, *self.about, seed.step)


class _Sum:
    """Of tensors by name, each set of them bounded to the length `most` (L2), in double precision.

    A set with a number that is not finite counts as zero: it would make the sum tell of it, whatever the noise.
    """

    def __init__(self, most: float) -> None:
        self.most, self.values = most, Tensors()

    def add(self, values: Tensors) -> None:
        sound = all(math.isfinite(value.abs().max()) for value in values.values() if value.numel())
        for name, value in (bounded(values, self.most) if sound else values).items():
            wide = value.double() if sound else torch.zeros_like(value, dtype=torch.float64)
            self.values[name] = self.values[name] + wide if name in self.values else wide
