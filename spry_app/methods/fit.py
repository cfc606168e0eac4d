"""How a method's gradient is fitted to the model it will be used on, as values of a Method. Knows a model only by the
blocks in which its trainable tensors lie.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from spry_app.autodiff.gradients import Gradient
from spry_app.autodiff.two_blocks import two_blocks
from spry_app.config import ClientConfig
from spry_app.errors import SpryError


@dataclass(frozen=True)
class Layout:
    """depths: trainable tensor -> its block, counted from the bottom; what lies above all is at `blocks`, the number
    of blocks, which is 0 where they are not known.
    """

    depths: Mapping[str, int]
    blocks: int


Fit = Callable[[Gradient, Layout, ClientConfig], Gradient]
"""(the method's, the model, config) -> the one that is used on this model, the same on server and clients."""


def as_it_is(gradient: Gradient, layout: Layout, config: ClientConfig) -> Gradient:
    """For whole models, whatever they are made of."""
    return gradient


def cut_in_two(h: float) -> Fit:
    """Central differences over a step of h, with several directions of the upper half for one of the lower (FedSPZO).

    Raises SpryError where the model cannot be cut at `client.cut`.
    """

    def fit(gradient: Gradient, layout: Layout, config: ClientConfig) -> Gradient:
        cut = config.cut or layout.blocks // 2
        if not 0 < cut <= layout.blocks:
            raise SpryError(
                f"client.cut={config.cut} does not cut this model in two: it has {layout.blocks} blocks that are "
                "known. client.cut must be from 1 to that number, or 0 for the middle of two or more; a model that "
                'cannot be cut takes method="fedmezo".'
            )
        below = frozenset(name for name, depth in layout.depths.items() if depth < cut)
        return two_blocks(h, config.upper_directions, below, cut, cut / layout.blocks)

    return fit
