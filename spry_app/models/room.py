"""Whether the weights of a model fit into what is free, told before they are loaded. Loads nothing."""

from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spry_app.config import ModelConfig
from spry_app.errors import SpryError

_GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_QUANTISED_BYTES = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "int8": 1.0}
"""A weight, with its share of the scale: one float32 for 64 weights, or for a whole row."""
_SMALLER = (("none", "bfloat16"), ("int8", "bfloat16"), ("nf4", "bfloat16"))


def free_bytes(device: torch.device) -> int:
    """What another allocation may take, at the most; a container's limit counts."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    return min(int(psutil.virtual_memory().available), _free_in_container())


def _free_in_container(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What the limit of a container (cgroup v2) leaves; more than any machine has where there is none.

    Files that the kernel keeps in memory count as free: it lets go of them.
    """
    try:
        left = int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return left + int(stat["active_file"]) + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):  # no such file, or the limit is "max"
        return 1 << 62


def weight_bytes(skeleton: PreTrainedModel, head: tuple[str, ...], quantization: str, dtype: str) -> int:
    """What the weights take once loaded: linear layers outside the head quantised, all else in `dtype`.

    skeleton: the model, of which only shapes are read.
    """
    everything = sum(parameter.numel() for parameter in skeleton.parameters())
    linear = 0
    if quantization in _QUANTISED_BYTES:
        parts = [(name, part) for name, part in skeleton.named_modules() if isinstance(part, nn.Linear | Conv1D)]
        own = {id(part.weight): part.weight.numel() for name, part in parts if name.split(".")[0] not in head}
        linear = sum(own.values())
    return round((everything - linear) * _BYTES[dtype] + linear * _QUANTISED_BYTES.get(quantization, 0.0))


def check_room(skeleton: PreTrainedModel, head: tuple[str, ...], config: ModelConfig, device: torch.device) -> None:
    """Raises SpryError where the weights take more than is free, with what would fit."""
    free, needed = free_bytes(device), weight_bytes(skeleton, head, config.quantization, config.dtype)
    if needed <= free:
        return
    smaller = {row: weight_bytes(skeleton, head, *row) for row in _SMALLER}
    fitting = [
        f'model.quantization="{quantization}" with model.dtype="{dtype}" ({_gib(size)})'
        for (quantization, dtype), size in smaller.items()
        if size <= free
    ]
    would = (
        f"What fits: {', '.join(fitting)}." if fitting else f"Nothing fits: nf4 takes {_gib(min(smaller.values()))}."
    )
    raise SpryError(
        f'model.name is {config.name!r}, whose weights take {_gib(needed)} with model.quantization="'
        f'{config.quantization}" and model.dtype="{config.dtype}", and {_gib(free)} are free on {device}. {would}'
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size > _GIB / 10 else f"{size / 2**20:.2f} MiB"
