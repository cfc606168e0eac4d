"""Tiny random causal language models with a tokenizer of bytes, and rows for them. Not a test itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from spry_app.config import DataConfig
from spry_app.tasks import IGNORED, TASKS, Encoded

SPECIAL = ("<pad>", "</s>", "<|im_start|>", "<|im_end|>")
WORDS = 256 + len(SPECIAL)
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16)),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, intermediate_size=32, num_key_value_heads=2, sliding_window=100)
    ),
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As many models have it, with transformers' own marks around what the assistant says."""
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def byte_tokenizer(template: str = "") -> PreTrainedTokenizerFast:
    """A token a byte, so that text and tokens can be told from each other by counting."""
    letters = {letter: len(SPECIAL) + index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    model = Tokenizer(BPE({name: index for index, name in enumerate(SPECIAL)} | letters, merges=[]))
    model.pre_tokenizer, model.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_input_names=["input_ids", "attention_mask"],
    )
    if template:
        fast.chat_template = template
    return fast


def causal_checkpoint(folder: Path, family: str = "llama", template: str = "", seed: int = 0) -> str:
    """Weights large enough that every token matters."""
    model = FAMILIES[family]()
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if value.dim() > 1:
            value.data.normal_(0.0, 0.25, generator=generator)
        elif name.endswith("bias"):
            value.data.zero_()
    model.save_pretrained(folder)
    byte_tokenizer(template).save_pretrained(folder)
    return str(folder)


def instructions(path: Path, rows: int, offset: int = 0) -> str:
    """Prompts of several lengths, each answered by whether a word praises."""
    words = ("good", "bad", "great", "awful", "fine", "poor")
    lines = []
    for index in range(offset, offset + rows):
        word = words[index % len(words)]
        said = {"prompt": f"{'very ' * (index % 3)}{word}", "completion": "yes" if index % 2 == 0 else "no, no"}
        lines.append(json.dumps(said | {"text": f"{said['prompt']} is {word}", "kind": word}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def encode(rows: Dataset, training: bool = True, template: str = "", **keys: Any) -> Encoded:
    config = DataConfig(task="causal-lm", **{"max_length": 100, **keys})
    return TASKS["causal-lm"].encode(rows, byte_tokenizer(template), config, training)


def learned(rows: Encoded, row: int = 0) -> str:
    """The text of the tokens that count."""
    return rows.tokenizer.decode([label for label in rows.targets["labels"][row] if label != IGNORED])  # type: ignore


def turns(*said: tuple[str, str]) -> Dataset:
    rows = [[{"role": role, "content": text, "answer": role == "assistant"} for role, text in said]]
    return Dataset.from_dict({"turns": rows})


def whole(rows: Encoded, row: int = 0) -> str:
    return str(rows.tokenizer.decode(rows.features["input_ids"][row]))
