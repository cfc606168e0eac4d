"""Attach a PEFT adapter to a frozen model: which matrices, which head, in which precision. Nothing here trains."""

import re
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spry_app.config import AdapterConfig
from spry_app.errors import SpryError

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
    model: PreTrainedModel, adapter: AdapterConfig, head: tuple[str, ...], name: str, revision: str
) -> PeftModel:
    """The model with LoRA matrices and a copy of its head as the only trainable parameters, all but biases fp32.

    `name` and `revision` are what a saved adapter gives as its base model. LoRA's first factor is drawn from torch's
    global generator. Raises SpryError if a target is not in the model.
    """
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        bias=adapter.bias,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        modules_to_save=list(head),
        target_modules=DUMMY_TARGET_MODULES if adapter.kind == "none" else _targets(model, adapter.targets, head),
    )
    with warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        adapted = get_peft_model(model, config)
    config.base_model_name_or_path = name
    config.revision = revision or None
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()
            module.register_forward_pre_hook(_to_float32)
    return adapted


def _targets(model: PreTrainedModel, wanted: str, head: tuple[str, ...]) -> list[str] | str:
    """Names for PEFT; a pattern where a bare name would also take matrices of the head."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    inside = [name for name in linear if name.split(".")[0] not in head]
    short = {name.rpartition(".")[2] for name in inside}
    asked = [name.strip() for name in wanted.split(",") if name.strip()]
    names = asked or _default_targets(model.config.model_type, short)
    missing = [name for name in names if not any(_matches(module, name) for module in inside)]
    if missing or not names:
        got = f"adapter.targets names {', '.join(missing)}, not in this {model.config.model_type} model"
        unknown = f"adapter.targets is empty, and query and value of a {model.config.model_type} model are not known"
        raise SpryError(f"{got if missing else unknown}. Linear layers it has: {', '.join(sorted(short))}.")
    if not any(_matches(module, name) for module in set(linear) - set(inside) for name in names):
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
