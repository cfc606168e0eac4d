"""Rows as tokens, and batches of them as padded tensors. What the tokens mean, each task says; whether they are in
memory or on disk, whoever made the columns.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from spry_app.tasks.task import LearningTask

IGNORED = -100
"""Target of a token that does not count, as in PyTorch and transformers."""
Lists = Sequence[list[int]]
"""Of each row token-wise values; one that has `lengths` tells how many there are without reading them."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Rows as tokens: what passes through the model as one example each.

    features: tokenizer output by name (input_ids, attention_mask, ...), a list of token-wise values a row.
    targets: by name, of each row one number, or one a token. cut: how many rows were longer than the maximum length.
    dropped: how many had nothing left to learn from. terms: of how many terms each row's loss is the sum; empty for one
    each. padding: "left" or "right", "" for the tokenizer's own side. kept: what the task's judge wants of each row
    beyond tensors, the model nothing. together: what the set in which each row is judged is known by; empty where each
    is on its own.
    """

    features: Mapping[str, Lists]
    targets: Mapping[str, Sequence[int] | Sequence[float] | Lists]
    cut: int
    tokenizer: PreTrainedTokenizerBase
    task: "LearningTask"
    dropped: int = 0
    terms: Sequence[int] = ()
    padding: str = ""
    kept: Sequence[Any] = field(default=(), repr=False)
    together: Sequence[int | str] = ()

    def __len__(self) -> int:
        return len(self.features.get("input_ids", ()))

    @property
    def padding_side(self) -> str:
        return self.padding or str(self.tokenizer.padding_side)

    def length(self, row: int) -> int:
        """Tokens of a row."""
        ids = self.features["input_ids"]
        return int(ids.lengths[row]) if hasattr(ids, "lengths") else len(ids[row])

    def lost(self) -> str:
        """What became of rows that were too long, as a sentence; empty if none was."""
        if not (self.cut or self.dropped):
            return ""
        return (
            f"{self.cut} rows are longer than data.max-length and were cut or split, {self.dropped} have nothing left "
            f"to learn and were dropped; {len(self)} are left."
        )

    def by_length(self, indices: Iterable[int]) -> list[int]:
        """The rows from the shortest to the longest: batches in this order hold little padding."""
        return sorted(indices, key=self.length)

    def weight(self, indices: Sequence[int]) -> int:
        """Of how many terms the mean loss of these rows is the mean."""
        return sum(self.terms[index] for index in indices) if self.terms else len(indices)

    def parts(self, size: int) -> Iterator[list[int]]:
        """All rows as they are scored: `size` at a time, or more where the last ones are judged together."""
        order = self.by_length(range(len(self)))
        if not self.together:
            yield from (order[start : start + size] for start in range(0, len(order), size))
            return
        sets = dict[int | str, list[int]]()
        for row in order:
            sets.setdefault(self.together[row], []).append(row)
        part: list[int] = []
        for number in sorted(sets, key=lambda number: self.length(sets[number][-1])):
            part += sets[number]
            if len(part) >= size:
                yield part
                part = []
        if part:
            yield part

    def inputs(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Of these rows, (rows, longest of them), int64 on the CPU."""
        chosen = {name: [values[index] for index in indices] for name, values in self.features.items()}
        return dict(self.tokenizer.pad(chosen, return_tensors="pt", verbose=False, padding_side=self.padding_side))

    def aims(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Targets of these rows, (rows,) or padded like the inputs, on the CPU: int64, or float32 of fractions."""
        longest = max(map(self.length, indices), default=0)
        return {
            name: torch.tensor([self._padded(values[index], longest) for index in indices])
            for name, values in self.targets.items()
        }

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Inputs and targets."""
        return self.inputs(indices) | self.aims(indices)

    def _padded(self, target: float | list[int], longest: int) -> float | list[int]:
        if not isinstance(target, list):
            return target
        beside = [IGNORED] * (longest - len(target))
        return beside + target if self.padding_side == "left" else target + beside
