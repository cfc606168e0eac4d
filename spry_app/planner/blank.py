"""A node of nothing but shapes: a model without weights, or with random ones, and rows of one length. Nothing runs."""

import functools
from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from spry_app.autodiff.directions import Tensors
from spry_app.client.node import Node
from spry_app.config import RunConfig
from spry_app.data import label_names
from spry_app.models import AdaptedModel
from spry_app.models.skeleton import META, skeleton
from spry_app.tasks import Encoded, LearningTask, get_task

WORD = 2
"""Token of every place."""
Targets = Callable[[list[int]], dict[str, list[int] | list[list[int]]]]
TARGETS: dict[str, Targets] = {
    "SEQ_CLS": lambda lengths: {"labels": [0] * len(lengths)},
    "CAUSAL_LM": lambda lengths: {"labels": [[WORD] * length for length in lengths]},
    "QUESTION_ANS": lambda lengths: {"start": [0] * len(lengths), "end": [length - 1 for length in lengths]},
}
"""PEFT's name for a task -> tokens of each row -> what they are to be told from, as spry_app.tasks encodes it."""


def model_of(config: RunConfig, device: torch.device = META, layers: int = 0) -> AdaptedModel:
    """Of the run's shapes and formats; see models.skeleton."""
    task, labels = get_task(config.data), len(label_names(config.data))
    return skeleton(config.model, config.adapter, task, labels, _tokenizer(), device, layers)


def node_of(adapted: AdaptedModel, task: LearningTask, rows: int, length: int) -> Node:
    """With so many rows to train on, of so many tokens each; but one, which makes a batch need a mask, as most do."""
    shorter = 1 if rows > 1 and length > 1 else 0
    lengths = [length - shorter] + [length] * (rows - 1)
    features = {"input_ids": [[WORD] * n for n in lengths], "attention_mask": [[1] * n for n in lengths]}
    train = Encoded(dict(features), TARGETS[task.peft_type](lengths), 0, _tokenizer(), task)
    heldout = Encoded({}, TARGETS[task.peft_type]([]), 0, _tokenizer(), task)
    return Node(adapted, train, heldout, start_of(adapted), -1)


def start_of(adapted: AdaptedModel) -> Tensors:
    """The trainable tensors, all zero: fp32 on the CPU, as a server sends them."""
    names = (name for unit in adapted.units.values() for name in unit)
    return {name: torch.zeros(adapted.model.get_parameter(name).shape) for name in names}


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    """Pads, and nothing else."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "word": WORD}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")  # type: ignore[no-untyped-call]
