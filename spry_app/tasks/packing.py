"""Rows that share a pass without seeing one another. Which rows those are, and what is learned from them, is not known
here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spry_app.errors import SpryError
from spry_app.tasks.encoded import Encoded, Lists


def bins(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row numbers that together are at most `size` long: best fit, the longest first (as in arXiv 2404.10830)."""
    found: list[list[int]] = []
    room: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        length = lengths[row]
        left = min((space for space, those in room.items() if space >= length and those), default=None)
        if left is None:
            found.append([])
            left, number = max(size, length), len(found) - 1
        else:
            number = room[left].pop()
        found[number].append(row)
        room.setdefault(left - length, []).append(number)
    return found


@dataclass(frozen=True, eq=False)
class Packed(Encoded):
    """Rows of several examples each. The feature "example" numbers those of a row, from 0."""

    def inputs(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """input_ids and position_ids, which count from 0 in each example, (rows, tokens); and as attention_mask, bool,
        which token sees which, (rows, 1, tokens, tokens): those of its example up to itself.
        """
        ids, example, at = (self._stacked(name, indices) for name in ("input_ids", "example", "position_ids"))
        same = example.unsqueeze(-1) == example.unsqueeze(-2)
        return {"input_ids": ids, "position_ids": at, "attention_mask": same.tril().unsqueeze(1)}

    def _stacked(self, name: str, indices: Sequence[int]) -> Tensor:
        """Padded on the right, where nothing that counts sees it. Padding is an example of its own."""
        padding = {"input_ids": self.tokenizer.pad_token_id or 0, "example": -1, "position_ids": 0}[name]
        rows = [torch.tensor(self.features[name][index]) for index in indices]
        return pad_sequence(rows, batch_first=True, padding_value=padding)


class _Joined(Sequence[list[int]]):
    """A row for each of `bins`, put together when it is read. of: (number within the bin, row) -> its values."""

    def __init__(
        self, of: Callable[[int, int], Sequence[int]], bins: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> None:
        self._of, self._bins, self.lengths = of, bins, lengths

    def __len__(self) -> int:
        return len(self._bins)

    @overload
    def __getitem__(self, at: int) -> list[int]: ...
    @overload
    def __getitem__(self, at: slice) -> "list[list[int]]": ...
    def __getitem__(self, at: int | slice) -> list[int] | list[list[int]]:
        if isinstance(at, slice):
            return [self[row] for row in range(len(self))[at]]
        return [value for number, row in enumerate(self._bins[at]) for value in self._of(number, row)]


def packed(rows: Encoded, size: int) -> Encoded:
    """The rows of `rows`, which have input_ids and labels, in rows of at most `size` tokens."""
    ids, labels, terms = rows.features["input_ids"], rows.targets["labels"], rows.terms
    each = [rows.length(row) for row in range(len(rows))]
    together = bins(each, size)
    lengths = [sum(each[row] for row in group) for group in together]

    def joined(of: Callable[[int, int], Sequence[int]]) -> Lists:
        return _Joined(of, together, lengths)

    features = {
        "input_ids": joined(lambda _, row: ids[row]),
        "position_ids": joined(lambda _, row: range(each[row])),
        "example": joined(lambda number, row: [number] * each[row]),
    }
    return Packed(
        features,
        {"labels": joined(lambda _, row: _listed(labels[row]))},
        rows.cut,
        rows.tokenizer,
        rows.task,
        rows.dropped,
        [sum(terms[row] for row in group) for group in together],
        "right",
    )


def _listed(values: float | list[int]) -> list[int]:
    return values if isinstance(values, list) else [int(values)]


@torch.no_grad()
def refuse_what_cannot_be_packed(adapted: Any, size: int) -> None:
    """Raises SpryError where the model (models.AdaptedModel) would not give rows of at most `size` tokens what it gives
    them alone; tried on a few.
    """
    settings = adapted.model.config
    window = getattr(settings, "sliding_window", None) if getattr(settings, "use_sliding_window", True) else None
    words = torch.arange(1, 9) % settings.vocab_size
    alone = torch.cat([adapted.features({}, {"input_ids": part[None]})[0] for part in (words[:5], words[5:])])
    example, at = torch.tensor([0] * 5 + [1] * 3), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    same = (example.unsqueeze(-1) == example).tril()[None, None]
    together = adapted.features({}, {"input_ids": words[None], "position_ids": at[None], "attention_mask": same})[0]
    reason = ""
    if window and window < size:
        reason = f"its attention reaches back {window} tokens, fewer than data.max-length ({size})"
    elif not torch.allclose(alone, together, rtol=1e-3, atol=1e-3 * float(alone.abs().max())):
        reason = "rows that share a pass change one another"
    if reason:
        raise SpryError(
            f"data.packing is true, and with this {settings.model_type} model it cannot be: {reason}. Set it false."
        )
