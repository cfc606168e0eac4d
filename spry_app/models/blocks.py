"""The transformer blocks of a model, and passes that leave some of them out or forget what happens inside them. What is
computed in between, and which blocks those are, is decided elsewhere.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from spry_app.autodiff.checkpointing import checkpointing, is_checkpointing
from spry_app.errors import SpryError
from spry_app.models.randomness import at_block


@dataclass(frozen=True)
class Entering:
    """Hidden states (rows, tokens, width) that enter block number `depth`; the number of blocks stands for the head."""

    depth: int
    hidden: Tensor


class NoPrefixError(RuntimeError):
    """A model whose blocks do not simply follow one another, so that none can be left out."""


class _Reached(Exception):
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@dataclass
class _Pass:
    """What a forward pass leaves out. stop: the block before which it ends; start: where it begins."""

    stop: int | None = None
    start: Entering | None = None
    block: int = 0
    """The block whose turn it is: blocks must run once each, in order."""

    def turn(self, index: int) -> None:
        if index != self.block:
            raise NoPrefixError(f"block {index} ran where block {self.block} was due")
        self.block += 1


_current: ContextVar[_Pass | None] = ContextVar("pass", default=None)


def install(model: nn.Module) -> tuple[str, ...]:
    """Give the blocks of `model` what the passes here and checkpointed backpropagation need; their names, in order.

    They are the layers that transformers itself would checkpoint, or else those of the outermost list of modules; ()
    where there is neither.
    """
    parts = list(model.named_modules())
    blocks = [(name, part) for name, part in parts if isinstance(part, GradientCheckpointingLayer)]
    if not blocks:
        outer = next((set(part) for _, part in parts if isinstance(part, nn.ModuleList)), set())
        blocks = [(name, part) for name, part in parts if part in outer]
    for index, (_, block) in enumerate(blocks):
        block.forward = functools.partial(_forward, block, block.forward, index)
    return tuple(name for name, _ in blocks)


def depth_of(name: str, blocks: tuple[str, ...]) -> int:
    """Number of the block in which tensor `name` lies; 0 for one of none of them, which may lie below them all."""
    return next((index for index, block in enumerate(blocks) if name.startswith(block + ".")), 0)


def run_until(depth: int, run: Callable[[], object], entering: Entering | None = None) -> Tensor:
    """The hidden states that enter block `depth` when `run` calls the model, which stops there.

    entering: where the pass begins, below `depth`. Raises NoPrefixError where the blocks are not a plain sequence.
    """
    with _passing(_Pass(stop=depth, start=entering)):
        try:
            run()
        except _Reached as reached:
            return reached.hidden
    raise NoPrefixError(f"the model never came to block {depth}")


@contextmanager
def starting_from(entering: Entering | None) -> Iterator[None]:
    """Inside it the blocks below `entering.depth` are left out, and `entering.hidden` goes on in their place."""
    if entering is None:
        yield
        return
    with _passing(_Pass(start=entering)):
        yield


@contextmanager
def _passing(a_pass: _Pass | None) -> Iterator[None]:
    token = _current.set(a_pass)
    try:
        yield
    finally:
        _current.reset(token)


def _forward(block: nn.Module, forward: Callable[..., Any], index: int, *args: Any, **kwargs: Any) -> Any:
    now = _current.get()
    if now is not None:
        now.turn(index)
        if now.start is not None and index < now.start.depth:
            last = index == now.start.depth - 1
            at_block(index + 1)
            return now.start.hidden if last else _hidden(args, kwargs)
    at_block(index)
    forgetting = is_checkpointing() and torch.is_grad_enabled()
    out = _forgetting(block, args, kwargs) if forgetting else forward(*args, **kwargs)
    at_block(index + 1)
    if now is not None and now.stop is not None:
        if not isinstance(out, Tensor):
            raise NoPrefixError(f"block {index} returns a {type(out).__name__}, not its hidden states alone")
        if index == now.stop - 1:
            raise _Reached(out)
    return out


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _forgetting(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The block, whose inside is computed again in the backward pass (non-reentrant checkpointing, arXiv 1604.06174).

    By then the caller has taken its own parameters and its dropout out of the model again, so both are kept here.
    """
    if kwargs.get("past_key_values") is not None:
        raise SpryError(
            'gradient is "checkpointed-backprop", which runs a block twice, and adapter.kind "prefix" gives blocks '
            'what they add to: set gradient to "backprop" or "forward-mode".'
        )
    own: dict[str, Tensor] = {name: value for name, value in block.named_parameters() if value.requires_grad}
    modes = {part: part.training for part in block.modules()}

    def run(*inputs: Any, **named: Any) -> Any:
        with _modes(modes), checkpointing(False), _passing(None):
            return functional_call(block, own, inputs, named)

    return checkpoint(run, *args, use_reentrant=False, **kwargs)


@contextmanager
def _modes(modes: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Dropout on or off, a module at a time."""
    before = {part: part.training for part in modes}
    try:
        for part, mode in modes.items():
            part.training = mode
        yield
    finally:
        for part, mode in before.items():
            part.training = mode
