"""Attach a PEFT adapter to a frozen model: which kind, which matrices, which head, in which precision. Nothing here
trains.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.ia3 import IA3Layer
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import (
    DUMMY_TARGET_MODULES,
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spry_app.config import AdapterConfig
from spry_app.errors import SpryError
from spry_app.models import prompts
from spry_app.models.dora import install_dora
from spry_app.models.pooling import averaging_block

Kind = Callable[[PreTrainedModel, AdapterConfig, tuple[str, ...]], PeftConfig]
"""A frozen model, its adapter keys and the names of its head -> PEFT's configuration."""

ALL_LINEAR = "all-linear"
"""PEFT's name; here of every linear layer of the numbered blocks. The gradient of BERT's pooler is so large that the
others would drown in its share of the noise.
"""
_QUERY_AND_VALUE = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("q", "v"),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("c_attn",),
    ("in_proj",),
)
"""What architectures call the query and value matrices, or the one that holds both; beyond these PEFT's own table."""


def attach(
    model: PreTrainedModel, adapter: AdapterConfig, head: tuple[str, ...], name: str, revision: str, peft_type: str
) -> PeftModel:
    """The model with an adapter and a copy of its head, where the task makes one, as the only trainable parameters, all
    but biases fp32. A block that takes the mean of all tokens (models.pooling) is left as it is.

    `name` and `revision` are what a saved adapter gives as its base model, `peft_type` as its task. LoRA's first factor
    is drawn from torch's global generator. Raises SpryError if the model has not what the adapter is to change.
    """
    config = KINDS[adapter.kind](model, adapter, head)
    config.task_type = peft_type
    with warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        # It says so of normalisations, whose kind it has itself.
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
        adapted = get_peft_model(model, config)
    if averaging := averaging_block(model):
        model.get_submodule(averaging).requires_grad_(False)  # PEFT trains biases wherever they are
    config.base_model_name_or_path = name
    config.revision = revision or None
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()
            module.register_forward_pre_hook(_to_float32)
        if isinstance(module, IA3Layer):
            module.register_forward_hook(_to_format_of_input)
    install_dora(adapted)
    return adapted


def _lora(model: PreTrainedModel, adapter: AdapterConfig, head: tuple[str, ...]) -> PeftConfig:
    """arXiv 2106.09685; rsLoRA: arXiv 2312.03732; DoRA: arXiv 2402.09353."""
    for name in adapter.ranks:
        if not any(_matches(module, name) for module in _linear(model, head)):
            short = sorted({module.rpartition(".")[2] for module in _linear(model, head)})
            raise SpryError(f"adapter.rank-pattern names {name}, not a linear layer here: it has {', '.join(short)}.")
    return LoraConfig(
        r=adapter.rank,
        rank_pattern={re.escape(name): rank for name, rank in adapter.ranks.items()},
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        lora_dropout=adapter.dropout,
        bias=adapter.bias,
        target_modules=_query_and_value(model, adapter, head),
        fan_in_fan_out=_is_transposed(model),
        **_shared(head),
    )


def _vera(model: PreTrainedModel, adapter: AdapterConfig, head: tuple[str, ...]) -> PeftConfig:
    """arXiv 2310.11454. The random factors are PEFT's, from a key that is the same for all, and saved."""
    return VeraConfig(
        r=adapter.rank,
        target_modules=_query_and_value(model, adapter, head),
        fan_in_fan_out=_is_transposed(model),
        **_shared(head),
    )


def _ia3(model: PreTrainedModel, adapter: AdapterConfig, head: tuple[str, ...]) -> PeftConfig:
    """arXiv 2205.05638: a factor for each output of a matrix, or for each input of one of a feed-forward layer.

    Matrices are PEFT's own choice unless adapter.targets is set; which of them are of feed-forward layers always is.
    """
    own = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(model.config.model_type, [])
    inner = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model.config.model_type, [])
    return IA3Config(
        target_modules=_targets(model, adapter.targets, head, own, "the matrices that IA3 scales"),
        # A pattern, since PEFT wants bare names to be among the targets.
        feedforward_modules=rf"(.*\.)?({'|'.join(map(re.escape, inner))})" if inner else [],
        fan_in_fan_out=_is_transposed(model),
        **_shared(head),
    )


def _bitfit(model: PreTrainedModel, adapter: AdapterConfig, head: tuple[str, ...]) -> PeftConfig:
    """arXiv 2106.10199: every bias that is there, and no further parameter."""
    if not any(name.endswith("bias") and name.split(".")[0] not in head for name, _ in model.named_parameters()):
        raise SpryError(
            f"adapter.kind is 'bitfit', which trains biases, and this {model.config.model_type} model has none: "
            'set adapter.kind to "lora" or "ia3".'
        )
    return LoraConfig(bias="all", target_modules=DUMMY_TARGET_MODULES, **_shared(head))


def _layernorm(model: PreTrainedModel, adapter: AdapterConfig, head: tuple[str, ...]) -> PeftConfig:
    """arXiv 2312.11420: weights and biases of every normalisation."""
    norms = [name for name, module in _adaptable(model, head) if _is_norm(module)]
    if not norms:
        raise SpryError(
            f"adapter.kind is 'layernorm', and no normalisation of this {model.config.model_type} model is known: "
            'set adapter.kind to "lora".'
        )
    return LNTuningConfig(target_modules=norms, **_shared(head))


def _is_norm(module: nn.Module) -> bool:
    """Models have classes of their own for what nn.RMSNorm does, and some for nn.LayerNorm."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def _head_alone(model: PreTrainedModel, adapter: AdapterConfig, head: tuple[str, ...]) -> PeftConfig:
    if not head:
        raise SpryError(
            "adapter.kind is 'none', which trains the head alone, and the models of this data.task have none that is "
            'new: set adapter.kind to "lora".'
        )
    return LoraConfig(target_modules=DUMMY_TARGET_MODULES, **_shared(head))


def _virtual(make: Callable[[PreTrainedModel, AdapterConfig, dict[str, Any]], PeftConfig]) -> Kind:
    return lambda model, adapter, head: make(model, adapter, _shared(head))


KINDS: dict[str, Kind] = {
    "lora": _lora,
    "vera": _vera,
    "ia3": _ia3,
    "bitfit": _bitfit,
    "layernorm": _layernorm,
    "prompt": _virtual(prompts.prompt),
    "p-tuning": _virtual(prompts.p_tuning),
    "prefix": _virtual(prompts.prefix),
    "none": _head_alone,
}


def _shared(head: tuple[str, ...]) -> dict[str, Any]:
    return {"modules_to_save": list(head) or None}


def _is_transposed(model: PreTrainedModel) -> bool:
    return any(isinstance(module, Conv1D) for module in model.modules())


def _linear(model: PreTrainedModel, head: tuple[str, ...]) -> list[str]:
    """Names of the linear layers that can be adapted."""
    return [name for name, module in _adaptable(model, head) if isinstance(module, nn.Linear | Conv1D)]


def _adaptable(model: PreTrainedModel, head: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, but for those of the head and of the block that takes the mean."""
    averaging = averaging_block(model)
    for name, module in model.named_modules():
        if name.split(".")[0] not in head and not (averaging and name.startswith(f"{averaging}.")):
            yield name, module


def _query_and_value(model: PreTrainedModel, adapter: AdapterConfig, head: tuple[str, ...]) -> list[str] | str:
    """adapter.targets, or the default of LoRA."""
    inside = _linear(model, head)
    default = _default_targets(model.config.model_type, {name.rpartition(".")[2] for name in inside})
    return _targets(model, adapter.targets, head, default, "query and value")


def _targets(
    model: PreTrainedModel, wanted: str, head: tuple[str, ...], default: list[str], what: str
) -> list[str] | str:
    """Names for PEFT: a pattern where a bare name would also take matrices of the head, whole names where it would take
    those of the block that takes the mean.
    """
    inside = _linear(model, head)
    if wanted.strip() == ALL_LINEAR:
        return [name for name in inside if any(part.isdigit() for part in name.split("."))] or inside
    names = [name.strip() for name in wanted.split(",") if name.strip()] or default
    missing = [name for name in names if not any(_matches(module, name) for module in inside)]
    if missing or not names:
        got = f"adapter.targets names {', '.join(missing)}, not in this {model.config.model_type} model"
        unknown = f"adapter.targets is empty, and {what} of a {model.config.model_type} model are not known"
        short = sorted({name.rpartition(".")[2] for name in inside})
        raise SpryError(f"{got if missing else unknown}. Linear layers it has: {', '.join(short)}.")
    if averaging_block(model):
        return [module for module in inside if any(_matches(module, name) for name in names)]
    if not any(_matches(module, name) for module in set(_linear(model, ())) - set(inside) for name in names):
        return names
    return rf"(?!({'|'.join(head)})\.)(.*\.)?({'|'.join(map(re.escape, names))})"


def _default_targets(model_type: str, short: set[str]) -> list[str]:
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, ())
    rows = (*_QUERY_AND_VALUE, () if isinstance(known, str) else known)
    return next((list(row) for row in rows if row and short.issuperset(row)), [])


def _matches(module: str, target: str) -> bool:
    return module == target or module.endswith("." + target)


def _to_float32(module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
    """A head in float32 takes the backbone's features as float32 too."""
    return tuple(a.float() if isinstance(a, Tensor) and a.dtype in (torch.float16, torch.bfloat16) else a for a in args)


def _to_format_of_input(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """PEFT's IA3 on a quantised layer answers a half-precision input in float32, which attention then refuses."""
    return output.to(args[0].dtype)
