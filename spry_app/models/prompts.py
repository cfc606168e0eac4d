"""Adapters of virtual tokens, which stand before a text or are attended to in every block; refused where what comes out
depends on how a batch is padded. Nothing here trains.
"""

import itertools
import warnings
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spry_app.config import AdapterConfig
from spry_app.errors import SpryError
from spry_app.models.pooling import averaging_block

_USUAL_LENGTH = 10**9
"""A tokenizer that knows no length says a larger one."""


def prompt(model: PreTrainedModel, adapter: AdapterConfig, shared: dict[str, Any]) -> PeftConfig:
    """arXiv 2104.08691, from embeddings of random words of the vocabulary, as it recommends."""
    sizes = _sizes(model, adapter) | {"token_dim": _width(model)}
    return PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **sizes, **shared)


def p_tuning(model: PreTrainedModel, adapter: AdapterConfig, shared: dict[str, Any]) -> PeftConfig:
    """arXiv 2103.10385, with PEFT's network of three layers."""
    sizes = _sizes(model, adapter) | {"token_dim": _width(model)}
    return PromptEncoderConfig(encoder_hidden_size=_width(model), **sizes, **shared)


def prefix(model: PreTrainedModel, adapter: AdapterConfig, shared: dict[str, Any]) -> PeftConfig:
    """arXiv 2101.00190, without the network that it makes the prefix from. Raises SpryError where a block takes the
    mean of all tokens, which its keys and values would become part of.
    """
    if averaging_block(model):
        raise SpryError(
            'adapter.kind is "prefix", to which every block attends, also that which takes the mean of all tokens: set '
            'adapter.kind to "prompt" or "lora", or model.pooling to "first".'
        )
    return PrefixTuningConfig(**_sizes(model, adapter), **shared)


def _sizes(model: PreTrainedModel, adapter: AdapterConfig) -> dict[str, Any]:
    """What PEFT reads from most configurations itself, but not where a family has names of its own."""
    settings = model.config
    return {
        "num_virtual_tokens": adapter.virtual_tokens,
        "token_dim": settings.hidden_size,
        "num_layers": settings.num_hidden_layers,
        "num_attention_heads": settings.num_attention_heads,
    }


def _width(model: PreTrainedModel) -> int:
    """Of an embedding, which ALBERT's hidden states have not."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[1])


def has_prompt(adapted: PeftModel) -> bool:
    return bool(adapted.active_peft_config.is_prompt_learning)


@torch.no_grad()
def check_prompt(adapted: PeftModel, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    """Leave room for the virtual tokens. Raises SpryError where a short text beside a long one is not what it is alone,
    or the model does not take them at all.

    Models that read the last token find it by the padding of the text, which they do not see once it is embeddings.
    """
    family = adapted.config.model_type
    if adapted.active_peft_config.task_type != "SEQ_CLS":
        raise SpryError(
            f'adapter.kind is "{kind}", whose virtual tokens would stand among those that are to be predicted: they '
            'are for tasks of classification; set adapter.kind to "lora".'
        )
    use = f'so adapter.kind "{kind}" is not for it; set adapter.kind to "lora" or "{_other(kind)}"'
    if tokenizer.model_max_length < _USUAL_LENGTH:
        tokenizer.model_max_length -= adapted.active_peft_config.num_virtual_tokens
    special = set(tokenizer.all_special_ids)
    words = list(itertools.islice((word for word in range(len(tokenizer)) if word not in special), 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            together, alone = (
                adapted(**tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(adapted.device)).logits[-1].float()
                for rows in ([words, words[:1]], [words[:1]])
            )
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            reason = str(error).strip().split("\n")[0].removesuffix(".")
            raise SpryError(f"This {family} model does not take PEFT's virtual tokens ({reason}), {use}.") from error
    if not torch.allclose(together, alone, rtol=0, atol=0.05 * float(alone.abs().max())):
        raise SpryError(
            f"With virtual tokens before it, what this {family} model says of a text depends on the padding of its "
            f"batch, {use}."
        )


def _other(kind: str) -> str:
    return "prompt" if kind == "prefix" else "prefix"
