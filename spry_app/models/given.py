"""Start from an adapter that is there already, in place of a new one. Which one a model has is decided by its keys."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spry_app.config import AdapterConfig
from spry_app.config.peft_keys import adapter_keys
from spry_app.errors import SpryError
from spry_app.models.adapted import AdaptedModel
from spry_app.models.pooled import is_copy
from spry_app.models.units import HEAD

logger = logging.getLogger(__name__)

_PROMPT = "prompt_embeddings"
"""PEFT's name in a file for the virtual tokens, which it makes for it."""


def start_from(adapted: AdaptedModel, adapter: AdapterConfig) -> None:
    """Give the tensors of `adapted` the values that the folder adapter.path holds; a head of other classes stays new.

    Raises SpryError where that is no adapter, or one of another base model, kind, rank, scale or targets than the keys
    of `adapter` have made, with the keys that would.
    """
    folder = Path(adapter.path).expanduser()
    saved, tensors = _read(folder)
    _check_base(adapted, saved, adapter.path)
    own = get_peft_model_state_dict(adapted.model, save_embedding_layers=False)
    head = _head_names(adapted, own)
    body = {name: value.shape for name, value in tensors.items() if name not in head}
    _check_keys(adapter, saved, body == {name: value.shape for name, value in own.items() if name not in head})
    _check_frozen(adapted, own, tensors, adapter.path)
    if any(name not in tensors or tensors[name].shape != own[name].shape for name in head):
        logger.warning("The head of %s is for other classes than this run's: this run begins with a new one.", folder)
        tensors = tensors | {name: own[name] for name in head}
    set_peft_model_state_dict(adapted.model, tensors)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        return dict(json.loads((folder / "adapter_config.json").read_text())), load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise SpryError(
            f"adapter.path is {str(folder)!r}, and no adapter can be read there ({error}): give a folder of the "
            f"server's machine with adapter_config.json and {WEIGHTS}."
        ) from None


def _check_base(adapted: AdaptedModel, saved: dict[str, Any], path: str) -> None:
    theirs, ours = str(saved.get("base_model_name_or_path")), str(_config(adapted).base_model_name_or_path)
    if theirs == ours:
        return
    if is_copy(ours) and not Path(theirs).is_absolute():
        raise SpryError(
            f"adapter.path is {path!r}, an adapter of {theirs} as it is, and this run is on the mean of all tokens: "
            'set model.pooling to "first", and model.name to that model.'
        )
    if any(Path(name).is_absolute() for name in (theirs, ours)):  # one model may lie in two folders
        logger.warning("The adapter in %s is of the base model %s, and model.name is %s.", path, theirs, ours)
        return
    raise SpryError(f"adapter.path is {path!r}, an adapter of {theirs}, and model.name is {ours!r}: set it to that.")


def _check_keys(adapter: AdapterConfig, saved: dict[str, Any], same_tensors: bool) -> None:
    keys = adapter_keys(saved)
    if not keys:
        raise SpryError(
            f"adapter.path is {adapter.path!r}, a {saved.get('peft_type')} adapter: Spry does not train those."
        )
    now = {f"adapter.{key}": value for key, value in adapter.model_dump(by_alias=True).items()}
    wrong = [key for key, value in keys.items() if key != "adapter.targets" and now[key] != value]
    if wrong or not same_tensors:
        setting = " ".join(f"{key}={json.dumps(value)}" for key, value in keys.items())
        raise SpryError(
            f"adapter.path is {adapter.path!r}, which is another adapter than these keys make "
            f"({', '.join(wrong) or 'adapter.targets'}): set {setting}."
        )


def _head_names(adapted: AdaptedModel, own: dict[str, Tensor]) -> set[str]:
    heads = {adapted.model.get_parameter(name).data_ptr() for name in adapted.units.get(HEAD, ())}
    return {name for name, value in own.items() if value.data_ptr() in heads}


def _check_frozen(adapted: AdaptedModel, own: dict[str, Tensor], given: dict[str, Tensor], path: str) -> None:
    """What is saved and not trained (VeRA's factors) every node draws for itself, so it must be that."""
    trained = {adapted.model.get_parameter(name).data_ptr() for names in adapted.units.values() for name in names}
    for name, value in own.items():
        fixed = value.data_ptr() not in trained and name != _PROMPT
        if fixed and not torch.equal(value.cpu(), given[name].to(value.dtype)):
            raise SpryError(
                f"adapter.path is {path!r}, whose {name} is another than every node draws for itself: it was made with "
                "another projection_prng_key, and cannot be trained on."
            )


def _config(adapted: AdaptedModel) -> Any:
    return adapted.model.peft_config["default"]
