"""Rows that share a pass without seeing one another. Which rows those are, and what is learned from them, is not known
here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spry_app.errors import SpryError
from spry_app.tasks.encoded import Encoded


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


def packed(rows: Encoded, size: int) -> Encoded:
    """The rows of `rows`, which have input_ids and labels, in rows of at most `size` tokens."""
    ids, labels, terms = rows.features["input_ids"], rows.targets["labels"], rows.terms
    together = bins([len(tokens) for tokens in ids], size)

    def joined(of: Sequence[Sequence[int]]) -> list[list[int]]:
        return [[value for row in group for value in of[row]] for group in together]

    features = {
        "input_ids": joined(ids),
        "position_ids": joined([range(len(tokens)) for tokens in ids]),
        "example": [[n for n, row in enumerate(group) for _ in ids[row]] for group in together],
    }
    return Packed(
        features,
        {"labels": joined([label for label in labels if isinstance(label, list)])},
        rows.cut,
        rows.tokenizer,
        rows.task,
        rows.dropped,
        [sum(terms[row] for row in group) for group in together],
        "right",
    )


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
