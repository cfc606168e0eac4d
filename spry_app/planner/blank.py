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
Targets = Callable[[int, int], dict[str, list[int] | list[list[int]]]]
TARGETS: dict[str, Targets] = {
    "SEQ_CLS": lambda rows, _: {"labels": [0] * rows},
    "CAUSAL_LM": lambda rows, length: {"labels": [[WORD] * length for _ in range(rows)]},
    "QUESTION_ANS": lambda rows, length: {"start": [0] * rows, "end": [length - 1] * rows},
}
"""PEFT's name for a task -> (rows, tokens of each) -> what they are to be told from, as spry_app.tasks encodes it."""


def model_of(config: RunConfig, device: torch.device = META, layers: int = 0) -> AdaptedModel:
    """Of the run's shapes and formats; see models.skeleton."""
    task, labels = get_task(config.data), len(label_names(config.data))
    return skeleton(config.model, config.adapter, task, labels, _tokenizer(), device, layers)


def node_of(adapted: AdaptedModel, task: LearningTask, rows: int, length: int) -> Node:
    """With so many rows to train on, of so many tokens each."""
    features = {"input_ids": [[WORD] * length for _ in range(rows)], "attention_mask": [[1] * length] * rows}
    encoded = [
        Encoded(dict(features) if count else {}, TARGETS[task.peft_type](count, length), 0, _tokenizer(), task)
        for count in (rows, 0)
    ]
    return Node(adapted, encoded[0], encoded[1], start_of(adapted), -1)


def start_of(adapted: AdaptedModel) -> Tensors:
    """The trainable tensors, all zero: fp32 on the CPU, as a server sends them."""
    names = (name for unit in adapted.units.values() for name in unit)
    return {name: torch.zeros(adapted.model.get_parameter(name).shape) for name in names}


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    """Pads, and nothing else."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "word": WORD}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")  # type: ignore[no-untyped-call]
