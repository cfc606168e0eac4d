"""Backpropagation through blocks that keeps the hidden states of a few of them and computes the others again, by halves
(Griewank 1992, doi:10.1080/10556789208805505). What a block is, the objective knows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spry_app.autodiff.directions import Tensors


@dataclass(frozen=True)
class Chain:
    """An objective block by block: loss = end(tensors, what leaves the last block), each function deterministic.

    blocks: their numbers, from the lowest with a tensor to differentiate. start: what enters that one; None where it is
    the lowest of all, which then takes with it what lies below the blocks. through: (tensors, low, high, what enters
    `low`) -> what enters `high`.
    """

    blocks: range
    start: Tensor | None
    through: Callable[[Tensors, int, int, Tensor | None], Tensor]
    end: Callable[[Tensors, Tensor | None], Tensor]


@dataclass
class WayBack:
    """From the loss of a chain to its tensors, of whose gradients `weight` times as much is added to `total`.

    Of n blocks the hidden states before at most log2(n) + 1 are in memory at once, and about n / 2 * log2(n) blocks are
    passed that would not be if all were kept; `again` counts them.
    """

    chain: Chain
    params: Tensors
    total: Tensors
    weight: float
    again: int = 0
    _loss: Tensor = field(init=False, repr=False)

    def loss(self) -> Tensor:
        """Goes all the way, and tells where it began."""
        blocks = self.chain.blocks
        self._back(blocks.start, blocks.stop + 1, self.chain.start, None)
        return self._loss

    def _back(self, low: int, high: int, entering: Tensor | None, grad: Tensor | None) -> Tensor | None:
        """The gradient of the loss by what enters block `low`, from that by what enters `high`; above the last block
        comes the loss itself.
        """
        if high - low == 1:
            return self._one(low, entering, grad)
        middle = (low + high) // 2
        with torch.no_grad():
            kept = self.chain.through(self.params, low, middle, entering)
        self.again += middle - low
        grad = self._back(middle, high, kept, grad)
        del kept
        return self._back(low, middle, entering, grad)

    def _one(self, block: int, entering: Tensor | None, grad: Tensor | None) -> Tensor | None:
        leaves = {name: tensor.detach().requires_grad_(True) for name, tensor in self.params.items()}
        start = None if entering is None else entering.detach().requires_grad_(True)
        with torch.enable_grad():
            if block == self.chain.blocks.stop:
                out = self.chain.end(leaves, start)
                self._loss = out.detach()
            else:
                out = self.chain.through(leaves, block, block + 1, start)
        inputs = [*leaves.values(), *(() if start is None else (start,))]
        found = torch.autograd.grad(out, inputs, grad, allow_unused=True)
        for name, own in zip(leaves, found, strict=False):
            if own is not None:
                self.total[name].add_(own, alpha=self.weight)
        return None if start is None else found[-1]
