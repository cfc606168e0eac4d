"""Several directions in one pass: how a rule sees all their tangents at once beside the one value. No rule is here.

PyTorch knows them as torch.vmap over torch.func.jvp. A kernel, the inner part of a rule, gets plain tensors instead: it
computes with the value once, may write in place, and takes one direction after another where that saves memory.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from spry_app.autodiff.duals import Pair, dual

Fan = tuple[Any, Tensor | None]
"""A value and its tangents along the K directions of a pass: (K, *shape of the value), or None for zeros."""

Kernel = Callable[..., tuple[Tensor, Tensor]]
"""(Fan of each operand, of which one at least has tangents) -> value and tangents, which share no memory with them."""


def along(kernel: Kernel, *operands: Pair) -> Tensor:
    """What `kernel` makes of dual numbers, as a dual number; of one direction or of all that share the pass."""
    values, tangents = zip(*operands, strict=True)
    layers = _functorch.get_interpreter_stack() or ()
    if [layer.key() for layer in layers] == [TransformType.Vmap, TransformType.Jvp]:
        plain, fanned = [_bare(value) for value in values], [_bare(tangent) for tangent in tangents]
        if all(axis is None for _, axis in plain) and any(axis is not None for _, axis in fanned):
            return _together(kernel, [value for value, _ in plain], fanned, *(layer.level() for layer in layers))
    alone = (None if tangent is None else tangent.unsqueeze(0) for tangent in tangents)
    value, tangent = kernel(*zip(values, alone, strict=True))
    return dual(value, tangent.squeeze(0))


def in_vmap() -> bool:
    """Whether a model's own torch.vmap is running, in which dual numbers cannot be taken apart."""
    innermost = _functorch.peek_interpreter_stack()
    return innermost is not None and innermost.key() == TransformType.Vmap


def directions(*tangents: Tensor | None) -> int:
    """K of the first that is not None."""
    return next(len(tangent) for tangent in tangents if tangent is not None)


def fan(tangents: Iterator[Tensor], count: int) -> Tensor:
    """Tangents along `count` directions, made one by one -> (K, *shape), with one of them in memory twice at most."""
    first = next(tangents)
    if count == 1:
        return first.unsqueeze(0)
    together = first.new_empty((count, *first.shape))
    for at, tangent in enumerate(itertools.chain((first,), tangents)):
        together[at] = tangent
    return together


def spread(tangents: Tensor, value: Tensor) -> Tensor:
    """(K, *shape) -> a view that broadcasts against (K, *shape of value) as the shapes themselves do."""
    return tangents[(slice(None), *(None,) * (value.dim() + 1 - tangents.dim()))]


def _together(
    kernel: Kernel,
    values: Sequence[Any],
    tangents: Sequence[tuple[Tensor | None, int | None]],
    vmap_level: int,
    jvp_level: int,
) -> Tensor:
    """Takes the wrappings of both transforms off by hand: an autograd.Function, the public way, takes 0.4 ms a call."""
    size = next(tangent.shape[axis] for tangent, axis in tangents if tangent is not None and axis is not None)
    with temporarily_clear_interpreter_stack():
        fans = [_first(tangent, axis, size) for tangent, axis in tangents]
        value, tangent = kernel(*zip(values, fans, strict=True))
        tangent = _functorch._add_batch_dim(tangent, 0, vmap_level)
    return dual(*(_functorch._wrap_for_grad(x, jvp_level) for x in (value, tangent)))


def _bare(tensor: Any) -> tuple[Any, int | None]:
    """What is inside the wrappings, and which axis is that of the directions."""
    if not isinstance(tensor, Tensor):
        return tensor, None
    while _functorch.is_gradtrackingtensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    if _functorch.is_batchedtensor(tensor):
        return _functorch.get_unwrapped(tensor), _functorch.maybe_get_bdim(tensor)
    return tensor, None


def _first(tangent: Tensor | None, axis: int | None, size: int) -> Tensor | None:
    if tangent is None:
        return None
    return tangent.expand(size, *tangent.shape) if axis is None else tangent.movedim(axis, 0)
