"""What was found of one thing, in a sentence for people and in values for scripts. How it is found is elsewhere."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Values = Mapping[str, int | float | str | bool]
Level = Literal["ok", "note", "problem"]
"""note: works, but not as well as it might, or is not known. problem: training would fail, or would be wrong."""


@dataclass(frozen=True)
class Finding:
    """sentence: plain words; of a problem, with what to do about it. values: what a script may want of it."""

    level: Level
    sentence: str
    values: Values = field(default_factory=dict)


Check = Callable[[], Finding]
