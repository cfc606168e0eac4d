"""How many bytes the temporaries of one operation may take. Nothing here measures or chooses: see budget.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

DEFAULT_BYTES = 2 << 20
_limit: ContextVar[int] = ContextVar("workspace_bytes", default=DEFAULT_BYTES)


def workspace_bytes() -> int:
    """The limit in force: attention cuts its query rows, and a loss over a vocabulary its tokens, to stay near it."""
    return _limit.get()


@contextmanager
def workspace(limit_bytes: int) -> Iterator[None]:
    """Inside it, `limit_bytes` is in force. Results change by rounding only."""
    token = _limit.set(limit_bytes)
    try:
        yield
    finally:
        _limit.reset(token)
