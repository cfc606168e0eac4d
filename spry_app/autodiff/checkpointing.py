"""Whether a backward pass shall compute activations again instead of keeping them. What is computed again, a block say,
is for the objective to decide: nothing here knows a model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_on: ContextVar[bool] = ContextVar("checkpointing", default=False)


def is_checkpointing() -> bool:
    """Asked by an objective that is being differentiated by backpropagation."""
    return _on.get()


@contextmanager
def checkpointing(on: bool = True) -> Iterator[None]:
    """Inside it, an objective keeps only what enters its checkpoints."""
    token = _on.set(on)
    try:
        yield
    finally:
        _on.reset(token)
