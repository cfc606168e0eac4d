"""Tiny random transformers with LoRA for the tests; no checkpoint, no network. Not a test itself."""

from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

WORDS = 97
PAD = 1
LABELS = 3
SHARED = {"vocab_size": WORDS, "max_position_embeddings": 64, "pad_token_id": PAD, "num_labels": LABELS}
USUAL = SHARED | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}


def _bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**USUAL))


def _roberta() -> PreTrainedModel:
    return RobertaForSequenceClassification(RobertaConfig(**USUAL))


def _distilbert() -> PreTrainedModel:
    return DistilBertForSequenceClassification(DistilBertConfig(dim=16, n_layers=2, n_heads=4, hidden_dim=32, **SHARED))


def _llama() -> PreTrainedModel:
    return LlamaForSequenceClassification(LlamaConfig(num_key_value_heads=2, **USUAL))


def _opt() -> PreTrainedModel:
    return OPTForSequenceClassification(OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **USUAL))


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], list[str]]] = {
    "bert": (_bert, ["query", "value"]),
    "roberta": (_roberta, ["query", "value"]),
    "distilbert": (_distilbert, ["q_lin", "v_lin"]),
    "llama": (_llama, ["q_proj", "v_proj"]),
    "opt": (_opt, ["q_proj", "v_proj"]),
}
"""Family -> (a model of two layers, width 16, four heads; the modules that LoRA adapts)."""


def tiny_base(family: str, seed: int = 0) -> PreTrainedModel:
    """Random weights from `seed`, large enough that no layer is close to linear; in eval mode."""
    build, _ = MODELS[family]
    model = build()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.data = 1 + 0.1 * noise if "norm" in name.lower() and "weight" in name else 0.3 * noise
    return model.eval()


def tiny_model(family: str, dtype: torch.dtype = torch.float32, rank: int = 2, seed: int = 0) -> PeftModel:
    """LoRA on query and value and a trained head; LoRA's B is not zero, so that A has a gradient. In eval mode."""
    config = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=MODELS[family][1])
    model = get_peft_model(tiny_base(family, seed), config)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            tensor.data = 0.3 * torch.randn(tensor.shape, generator=generator)
    return model.to(dtype).eval()


def trainables(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}


def tiny_batch(examples: int = 5, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Token ids padded on the right to lengths between 2 and `length`, with labels."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (examples, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    ids = torch.randint(PAD + 1, WORDS, (examples, length), generator=generator)
    labels = torch.randint(0, LABELS, (examples,), generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask, "labels": labels}
