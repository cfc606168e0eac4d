"""Tiny random models with a tokenizer, written to a folder as a user's own checkpoint would be. Not a test itself."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import WORDS, tiny_base
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from spry_app.config import AdapterConfig, ModelConfig
from spry_app.models import AdaptedModel, load_model

SENTENCES = ["w5 w9 w11 w2", "w7 w8"]

MAPS: dict[str, dict[str, Any]] = {
    "core": {"subspace": "core", "rank": 3},
    "singular": {"subspace": "core", "rank": 3, "frame": "singular"},
    "combined": {"subspace": "combined", "rank": 3, "coordinates": 5},
    "shared": {"subspace": "shared", "rank": 2, "coordinates": 13},
    "random": {"subspace": "random", "rank": 2, "coordinates": 13},
}
"""Ways to train few coordinates -> keys of `adapter`."""


def write_checkpoint(folder: Path, family: str = "bert", pad: bool = True, seed: int = 0) -> str:
    """A checkpoint of tiny_models' `family`; without `pad` its tokenizer knows no padding token."""
    tiny_base(family, seed).save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<pad>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, WORDS)}
    model = WordLevel(vocabulary, unk_token="<unk>")
    if family == "qwen2":  # its tokenizer is of one class, whatever the folder says, which knows bytes and no words
        model = BPE(
            {name: vocabulary[name] for name in ("<unk>", "<pad>", "</s>")}
            | {c: 3 + i for i, c in enumerate("w0123456789Ġ")},
            [],
        )
    words = Tokenizer(model)
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>"} if pad else {}
    names = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", model_input_names=names, **special
    ).save_pretrained(folder)
    return str(folder)


def load_tiny(folder: str, seed: int = 0, model: dict[str, Any] | None = None, **adapter: Any) -> AdaptedModel:
    """For three classes. model, adapter: keys of these sections."""
    config = ModelConfig.model_validate({"name": folder, "device": "cpu", **(model or {})})
    return load_model(config, AdapterConfig.model_validate(adapter), 3, seed)


def inputs_of(adapted: AdaptedModel) -> dict[str, Tensor]:
    """SENTENCES as the model takes them."""
    return dict(adapted.tokenizer(SENTENCES, padding=True, return_tensors="pt"))


def shaken(tensors: dict[str, Tensor], scale: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """The tensors moved off their start, where half of LoRA is zero."""
    generator = torch.Generator().manual_seed(seed)
    return {name: t + scale * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
