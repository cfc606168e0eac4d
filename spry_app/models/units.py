"""Trainable tensors grouped into units, the pieces a server deals out; who gets which is not decided here."""

import re
from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

HEAD = "head"
Units = dict[str, tuple[str, ...]]

_BLOCK = re.compile(r".*?\.\d+(?=\.)")


def group(model: PeftModel) -> Units:
    """Unit name -> names of its trainable tensors, in the order the model defines its layers; the head last.

    One unit an adapted matrix (its low-rank factors and its own bias), one for the other trained biases of a block,
    one for everything that is trained in full (the classification head).
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
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            unit = next((owners[parent] for parent in _parents(name) if parent in owners), None)
            units.setdefault(unit or _bias_unit(short(name)), []).append(name)
    head = units.pop(HEAD, [])
    return {unit: tuple(names) for unit, names in [*units.items(), (HEAD, head)] if names}


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _bias_unit(name: str) -> str:
    block = _BLOCK.match(name)
    return f"{block.group() if block else name.partition('.')[0]}.biases"
