"""A stretch of code with random numbers of its own; the process's generators are left as they were found."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_blocks: ContextVar[tuple[int, list[int]] | None] = ContextVar("blocks", default=None)
"""The seed, and the CUDA devices, of a pass whose blocks have random numbers of their own."""


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the CPU's generator and that of `device` start from `seed`."""
    cuda = _cuda(device)
    with torch.random.fork_rng(devices=cuda):
        _start(seed, cuda)
        yield


@contextmanager
def seeded_by_block(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, as `seeded`; and what is drawn in a block depends on its number, not on what ran before it."""
    with seeded(seed, device):
        token = _blocks.set((seed, _cuda(device)))
        try:
            yield
        finally:
            _blocks.reset(token)


def at_block(index: int) -> None:
    """What is drawn from here on belongs to block `index`, or lies between the one below it and that."""
    now = _blocks.get()
    if now is not None:
        seed, cuda = now
        _start(hash((seed, index)) & (2**63 - 1), cuda)


def _cuda(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


def _start(seed: int, cuda: list[int]) -> None:
    torch.default_generator.manual_seed(seed)
    for index in cuda:
        torch.cuda.default_generators[index].manual_seed(seed)
