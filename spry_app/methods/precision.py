"""What an estimate of a gradient weighs beside others of unequal precision. Pure numbers; whose they are is not known.

One example's gradient is g + e with E|e|^2 = c |g|^2 (c is the "simple noise scale" of arXiv:1812.06162), so a batch of
B has a gradient b with E|b - g|^2 = c |g|^2 / B. Slopes along K directions give, of b, an estimate with r |b|^2 of
noise (methods.noise.RELATIVE_NOISE; r = 0 where the gradient is exact), and E|b|^2 = (1 + c / B) |g|^2. The mean over S
batches, of n = S B examples, then has the variance

    |g|^2 / S * (c / B + r (1 + c / B)) = |g|^2 / n * (c + r (B + c)),

and the mean of several such estimates has the least where each weighs n / (c + r (B + c)). Clients are taken to have
one g: where their rows differ, more of the mean is of the rows of those whose estimates are precise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SINGLE = 100.0
"""c where nothing is known of it yet: a guess. From about the batch size on, weights hardly depend on it: for slopes
against exact gradients their ratio falls from infinity at c = 0 to 1 + r."""
LEAST, MOST = 1.0, 1e6
"""Of c: below is too good to be true of stochastic gradients, above no weight changes any more."""
DECAY = 0.9
"""Of what earlier rounds have told of c, a round."""


def relative_variance(noise: float, batch: int, single: float) -> float:
    """n Var / |g|^2 of an estimate from n examples. noise: r, of a batch's estimate. batch: B. single: c."""
    return single + noise * (batch + single)


@dataclass(frozen=True)
class Spread:
    """What rounds have told of c: sums, with the last rounds counting most, of c |g|^2 and of |g|^2, each unbiased."""

    noise: float = 0.0
    signal: float = 0.0

    @property
    def single(self) -> float:
        """c; where |g|^2 was too small to be seen, the most."""
        if self == Spread():
            return SINGLE
        return min(max(self.noise / self.signal, LEAST), MOST) if self.signal > 0 else MOST

    def after(self, found: Sequence["Spread"]) -> "Spread":
        """A round in which these were `found`; none where nothing could be."""
        if not found:
            return self
        noise, signal = sum(one.noise for one in found), sum(one.signal for one in found)
        return Spread(DECAY * self.noise + noise, DECAY * self.signal + signal)


def spread(estimates: Sequence[Tensor], examples: Sequence[float], noise: float, batch: int) -> Spread:
    """From m >= 2 independent estimates x_i, shape (d,), of n_i `examples`, all with `noise` r and `batch` B.

    V = n / (m - 1) sum n_i / n |x_i - mean|^2 has the mean |g|^2 (c + r (B + c)), as n_i Var(x_i) is the same for all;
    s = |mean|^2 - V / n has |g|^2. So (V - r B s) / (1 + r) has c |g|^2.
    """
    total = sum(examples)
    part = torch.tensor(examples, dtype=torch.float64) / total
    stack = torch.stack([estimate.double() for estimate in estimates])
    mean = part @ stack
    variance = total / (len(estimates) - 1) * float(part @ (stack - mean).square().sum(1))
    signal = float(mean.square().sum()) - variance / total
    return Spread((variance - noise * batch * signal) / (1 + noise), signal)
