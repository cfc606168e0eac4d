"""How many local steps a client begins before its deadline. What a step does is not known here."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
Clock = Callable[[], float]
"""Seconds that only ever grow, from whenever."""
RECENT = 2
"""Steps by which the next one is judged: the first ones of all also fill caches, and batches differ in length."""


def until(deadline: float, steps: Iterable[T], clock: Clock) -> Iterator[T]:
    """Those of `steps` that end before the deadline if each takes as long as the slowest of the `RECENT` before it; the
    first in any case. A step is under way until the next one is asked for.

    deadline: on `clock`; infinity for none.
    """
    took: list[float] = []
    for step in steps:
        begun = clock()
        if took and begun + max(took[-RECENT:]) > deadline:
            return
        yield step
        took.append(clock() - begun)
