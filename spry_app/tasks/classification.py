"""Classification of a text or a pair of texts: tokens, padded batches, loss, score. Never a model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Encoded:
    """Rows as tokens.

    features: tokenizer output by name (input_ids, attention_mask, ...), a list of token-wise values a row.
    cut: number of rows that were longer than the maximum length.
    """

    features: dict[str, list[list[int]]]
    labels: list[int]
    cut: int
    tokenizer: PreTrainedTokenizerBase

    def __len__(self) -> int:
        return len(self.labels)

    def by_length(self, indices: Iterable[int]) -> list[int]:
        """The rows from the shortest to the longest: batches in this order hold little padding."""
        return sorted(indices, key=lambda row: len(self.features["input_ids"][row]))

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Model inputs of these rows, (rows, longest of them), and "labels", (rows,); all int64 on the CPU."""
        chosen = {name: [values[index] for index in indices] for name, values in self.features.items()}
        padded = self.tokenizer.pad(chosen, return_tensors="pt", verbose=False)
        return {**padded, "labels": torch.tensor([self.labels[index] for index in indices])}


def encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenise the columns text and, for pairs, text_pair; rows over `max_length` tokens are cut and counted."""
    texts = [dataset[name][:] for name in ("text", "text_pair") if name in dataset.column_names]
    if not len(dataset):
        return Encoded({}, [], 0, tokenizer)
    features = tokenizer(*texts, verbose=False)
    cut = sum(len(tokens) > max_length for tokens in features["input_ids"])
    if cut:
        features = tokenizer(*texts, truncation=True, max_length=max_length)
    return Encoded(dict(features), dataset["label"][:], cut, tokenizer)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy, float32. Shapes: (rows, classes), (rows,)."""
    return cross_entropy(logits.float(), labels)


def correct(logits: Tensor, labels: Tensor) -> int:
    """How many rows have their label as the largest logit."""
    return int((logits.argmax(-1) == labels).sum())
