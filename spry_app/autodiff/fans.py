"""Several directions in one pass: how a rule sees all their tangents at once beside the one value. No rule is here.

PyTorch knows them as torch.vmap over torch.func.jvp. A kernel, the inner part of a rule, gets plain tensors instead: it
computes with the value once, may write in place, and takes one direction after another where that saves memory.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from spry_app.autodiff.duals import Pair, dual

Fan = tuple[Any, Tensor | None]
"""A value and its tangents along the K directions of a pass: (K, *shape of the value), or None for zeros."""

Kernel = Callable[..., tuple[Tensor, Tensor]]
"""(Fan of each operand, of which one at least has tangents) -> value and tangents, which share no memory with them."""


def along(kernel: Kernel, *operands: Pair) -> Tensor:
    """What `kernel` makes of dual numbers, as a dual number; of one direction or of all that share the pass."""
    values, tangents = zip(*operands, strict=True)
    layers = _functorch.get_interpreter_stack()
    if not layers:
        return dual(*_alone(kernel, values, tangents))
    if [layer.key() for layer in layers] == [_functorch.TransformType.Vmap, _functorch.TransformType.Jvp]:
        bare = [_bare(value) for value in values], [_bare(tangent) for tangent in tangents]
        if all(dim is None for _, dim in bare[0]) and any(dim is not None for _, dim in bare[1]):
            return _together(kernel, [value for value, _ in bare[0]], bare[1], *(layer.level() for layer in layers))
    value, tangent = _Along.apply(kernel, len(values), *values, *tangents)  # type: ignore[no-untyped-call]
    return dual(value, tangent)


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


def _alone(kernel: Kernel, values: Sequence[Any], tangents: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    value, tangent = kernel(*zip(values, (None if t is None else t.unsqueeze(0) for t in tangents), strict=True))
    return value, tangent.squeeze(0)


def _together(
    kernel: Kernel,
    values: Sequence[Any],
    tangents: Sequence[tuple[Tensor | None, int | None]],
    vmap_level: int,
    jvp_level: int,
) -> Tensor:
    """The same as `_Along`, whose every call takes 0.4 ms: here the wrappings of both transforms come off by hand."""
    size = next(tangent.shape[dim] for tangent, dim in tangents if tangent is not None and dim is not None)
    with temporarily_clear_interpreter_stack():
        fans = [_first(tangent, dim, size) for tangent, dim in tangents]
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


def _first(tangent: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if tangent is None:
        return None
    return tangent.expand(size, *tangent.shape) if dim is None else tangent.movedim(dim, 0)


class _Along(torch.autograd.Function):
    """A kernel under any other transforms, as when a model uses torch.vmap itself."""

    @staticmethod
    def forward(kernel: Kernel, count: int, *both: Any) -> tuple[Tensor, Tensor]:
        return _alone(kernel, both[:count], both[count:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], kernel: Kernel, count: int, *both: Any) -> Any:
        """One element of the axis after another: whether it is an axis of directions or of examples."""
        elements = []
        for k in range(info.batch_size):
            one = (x if dim is None else x.select(dim, k) for x, dim in zip(both, in_dims[2:], strict=True))
            elements.append(_Along.apply(kernel, count, *one))  # type: ignore[no-untyped-call]
        values, tangents = zip(*elements, strict=True)
        return (torch.stack(values), torch.stack(tangents)), (0, 0)
