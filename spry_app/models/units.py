"""Trainable tensors grouped into units, the pieces a server deals out; who gets which is not decided here."""

import re
from collections.abc import Iterable, Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

HEAD = "head"
COORDINATES = "coordinates"
"""Module of the coordinates that all adapted matrices share, at the top of the model."""
PROMPT = "prompt"
"""Unit of all virtual tokens."""
_PROMPT = "prompt_encoder."
"""PEFT's module of theirs, at the top of the model."""
Units = dict[str, tuple[str, ...]]

_BLOCK = re.compile(r"(.*?\.)(\d+)(?=\.)")
"""A block at the start of a name, as the stack it belongs to ("encoder.layer.") and its number there."""


def group(model: PeftModel) -> Units:
    """Unit name -> names of its trainable tensors, in the order the model defines its layers; the head last.

    One unit an adapted matrix (its low-rank factors and its own bias, or its IA3 factors), one for the other trained
    biases of a block, one for everything that is trained in full (the classification head), one for all virtual tokens,
    and one for each chunk of the coordinates that all matrices share; the last two, which reach the lowest block, come
    first.
    """
    wrapped = f"base_model.model.{model.get_base_model().base_model_prefix}."

    def short(name: str) -> str:
        return name.removeprefix(wrapped).removeprefix("base_model.model.")

    owners = {
        name: HEAD if isinstance(module, ModulesToSaveWrapper) else short(name)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)
    }
    units: dict[str, list[str]] = {}
    shared: Units = {name: (name,) for name, _ in model.named_parameters() if name.startswith(f"{COORDINATES}.")}
    prompt = tuple(name for name, p in model.named_parameters() if name.startswith(_PROMPT) and p.requires_grad)
    shared |= {PROMPT: prompt} if prompt else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in shared and name not in prompt:
            unit = next((owners[parent] for parent in _parents(name) if parent in owners), None)
            units.setdefault(unit or _bias_unit(short(name)), []).append(name)
    head = units.pop(HEAD, [])
    return shared | {unit: tuple(names) for unit, names in [*units.items(), (HEAD, head)] if names}


def depths(units: Iterable[str]) -> tuple[dict[str, int], int]:
    """Unit -> its block, counted from the bottom, and the number of blocks; by names alone, in the order of `group`.

    What stands before all blocks is at depth 0, what stands after them (the head) at the number of blocks. A second
    stack (a decoder) counts on from the first. Layers that share their weights (ALBERT's) are one block.
    """
    found: dict[str, int] = {}
    stack, base, blocks = "", 0, 0
    for unit in units:
        block = _BLOCK.match(unit)
        if block and block[1] != stack:
            stack, base = block[1], blocks
        found[unit] = base + int(block[2]) if block else blocks
        if block:
            blocks = max(blocks, found[unit] + 1)
    return found, blocks


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _bias_unit(name: str) -> str:
    block = _BLOCK.match(name)
    return f"{block.group() if block else name.partition('.')[0]}.biases"
