"""Tiny random transformers with LoRA for the tests, and their slopes by backprop; no checkpoint, no network. Not a test
itself.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaConfig,
    DebertaForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    Gemma3TextConfig,
    Gemma3TextForSequenceClassification,
    GemmaConfig,
    GemmaForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    Phi3Config,
    Phi3ForSequenceClassification,
    PhiConfig,
    PhiForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

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
DECODER = USUAL | {"num_key_value_heads": 2, "use_cache": False}


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


def _gpt2() -> PreTrainedModel:
    special = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 0}
    sizes = {"vocab_size": WORDS, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 32}
    return GPT2ForSequenceClassification(GPT2Config(num_labels=LABELS, use_cache=False, **special, **sizes))


def _mistral() -> PreTrainedModel:
    """No token sees more than four."""
    return MistralForSequenceClassification(MistralConfig(sliding_window=4, **DECODER))


def _qwen2() -> PreTrainedModel:
    return Qwen2ForSequenceClassification(Qwen2Config(**DECODER))


def _gemma() -> PreTrainedModel:
    return GemmaForSequenceClassification(GemmaConfig(head_dim=4, **DECODER))


def _gemma2() -> PreTrainedModel:
    """A soft cap so low that the scores reach it; one block sees four tokens, the other all."""
    special = {"query_pre_attn_scalar": 4, "attn_logit_softcapping": 1.0, "sliding_window": 4}
    return Gemma2ForSequenceClassification(Gemma2Config(head_dim=4, **special, **DECODER))


def _gemma3() -> PreTrainedModel:
    """The text model; one block sees four tokens, the other all."""
    special = {"query_pre_attn_scalar": 4, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3TextForSequenceClassification(Gemma3TextConfig(head_dim=4, **special, **DECODER))


def _qwen3() -> PreTrainedModel:
    """Queries and keys pass a norm each."""
    return Qwen3ForSequenceClassification(Qwen3Config(head_dim=4, **DECODER))


def _phi3() -> PreTrainedModel:
    """Query, key and value are one matrix."""
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return Phi3ForSequenceClassification(Phi3Config(**special, **DECODER))


def _phi() -> PreTrainedModel:
    return PhiForSequenceClassification(PhiConfig(**DECODER))


def _albert() -> PreTrainedModel:
    """Both layers share their weights."""
    return AlbertForSequenceClassification(AlbertConfig(embedding_size=8, **USUAL))


def _deberta() -> PreTrainedModel:
    """Query, key and value are one matrix; positions are relative and only in the attention."""
    positions = {"relative_attention": True, "max_relative_positions": 8, "pos_att_type": ["c2p", "p2c"]}
    return DebertaForSequenceClassification(DebertaConfig(position_biased_input=False, **positions, **USUAL))


def _deberta_v3(**special: Any) -> PreTrainedModel:
    """As the published checkpoints are: positions are relative, only in the attention, and have the keys of words."""
    positions = {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]}
    norms = {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
    return DebertaV2ForSequenceClassification(DebertaV2Config(**positions, **norms, **special, **USUAL))


def _deberta_v2() -> PreTrainedModel:
    """As v3, with a convolution beside the lowest block."""
    return _deberta_v3(conv_kernel_size=3, conv_act="gelu")


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], list[str]]] = {
    "bert": (_bert, ["query", "value"]),
    "roberta": (_roberta, ["query", "value"]),
    "distilbert": (_distilbert, ["q_lin", "v_lin"]),
    "llama": (_llama, ["q_proj", "v_proj"]),
    "opt": (_opt, ["q_proj", "v_proj"]),
}
"""Family -> (a model of two layers, width 16, four heads; the modules that LoRA adapts)."""

MORE_MODELS: dict[str, tuple[Callable[[], PreTrainedModel], list[str]]] = {
    "gpt2": (_gpt2, ["c_attn"]),
    "mistral": (_mistral, ["q_proj", "v_proj"]),
    "qwen2": (_qwen2, ["q_proj", "v_proj"]),
    "gemma": (_gemma, ["q_proj", "v_proj"]),
    "gemma2": (_gemma2, ["q_proj", "v_proj"]),
    "qwen3": (_qwen3, ["q_proj", "v_proj"]),
    "gemma3": (_gemma3, ["q_proj", "v_proj"]),
    "phi3": (_phi3, ["qkv_proj"]),
    "phi": (_phi, ["q_proj", "v_proj"]),
    "albert": (_albert, ["query", "value"]),
    "deberta": (_deberta, ["in_proj"]),
    "deberta-v2": (_deberta_v2, ["query_proj", "value_proj"]),
    "deberta-v3": (_deberta_v3, ["query_proj", "value_proj"]),
}
"""The same for families that only their slopes are tested for (test_families)."""

ALL_MODELS = MODELS | MORE_MODELS


def tiny_base(family: str, seed: int = 0) -> PreTrainedModel:
    """Random weights from `seed`, large enough that no layer is close to linear; in eval mode."""
    build, _ = ALL_MODELS[family]
    model = build()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.data = 1 + 0.1 * noise if _is_norm(name) and "weight" in name else 0.3 * noise
    return model.eval()


def _is_norm(name: str) -> bool:
    return "norm" in name.lower() or ".ln_" in name


def tiny_model(family: str, dtype: torch.dtype = torch.float32, rank: int = 2, seed: int = 0) -> PeftModel:
    """LoRA on query and value and a trained head; LoRA's B is not zero, so that A has a gradient. In eval mode."""
    base = tiny_base(family, seed)
    config = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=ALL_MODELS[family][1])
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in base.modules())
    model = get_peft_model(base, config)
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


class Float64(TorchFunctionMode):
    """Inside it what models compute in fp32, whatever their own format (norms, some softmaxes), is in float64 too."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        wider = {torch.float32: torch.float64}
        args = tuple(wider.get(arg, arg) if isinstance(arg, torch.dtype) else arg for arg in args)
        named = {
            key: wider.get(arg, arg) if isinstance(arg, torch.dtype) else arg for key, arg in (kwargs or {}).items()
        }
        return func(*args, **named)


def some_directions(params: Mapping[str, Tensor], count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in params.items()}
        for _ in range(count)
    ]


def slopes_by_backprop(
    objective: Callable[[dict[str, Tensor]], Tensor],
    params: Mapping[str, Tensor],
    directions: list[dict[str, Tensor]],
) -> list[float]:
    """The gradient from one backward pass, dotted with each direction in float64; PyTorch alone."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in params.items()}
    grads = torch.autograd.grad(objective(leaves), list(leaves.values()))
    by_name = dict(zip(leaves, grads, strict=True))
    return [sum((by_name[n].double() * t.double()).sum().item() for n, t in v.items()) for v in directions]
