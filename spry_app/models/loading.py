"""From a checkpoint and an adapter's settings to a model that can be trained, and from that to a folder for PEFT."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spry_app.config import AdapterConfig, ModelConfig
from spry_app.models.adapted import AdaptedModel
from spry_app.models.adapter import attach
from spry_app.models.blocks import install
from spry_app.models.checkpoint import Checkpoint, find_device, load_checkpoint
from spry_app.models.fingerprint import fingerprint, with_fixed
from spry_app.models.prompts import check_prompt, has_prompt
from spry_app.models.randomness import seeded
from spry_app.models.subspace import Fixed, Subspace, install_subspace
from spry_app.models.units import group
from spry_app.tasks import TASKS, LearningTask


def load_model(
    model: ModelConfig,
    adapter: AdapterConfig,
    num_labels: int,
    seed: int,
    path: str = "",
    frame: Fixed | None = None,
    task: LearningTask = TASKS["classification"],
) -> AdaptedModel:
    """Load, quantise, adapt. `path` is a node's own copy, taken instead of model.name.

    num_labels: classes of the task, 0 where it has none. frame: what is not computed here of a subspace of the
    adapter, but given (Subspace.sent).
    Whatever the checkpoint lacks and LoRA's first factors are drawn from `seed` alone, the same on every node.
    Raises SpryError for a model, device, quantiser or target that is not to be had.
    """
    device = find_device(model.device)
    with seeded(seed, device):
        base = load_checkpoint(model, task, num_labels, device, path)
        identity = fingerprint(base.model, base.head)
        adapted = attach(base.model, adapter, base.head, base.name, base.revision, task.peft_type)
    subspace = install_subspace(adapted, adapter, seed, frame)
    if subspace.fixed is not None:
        identity = with_fixed(identity, subspace.fixed.digest)
    if has_prompt(adapted):
        check_prompt(adapted.eval(), base.tokenizer, adapter.kind)
    return ready(adapted, base.tokenizer, identity, device, subspace)


def ready(
    adapted: PeftModel, tokenizer: PreTrainedTokenizerBase, identity: str, device: torch.device, subspace: Subspace
) -> AdaptedModel:
    """In eval mode, its units named and its blocks found, and no parameter asking for gradients."""
    adapted.eval()
    units = group(adapted)
    # A parameter that asks for gradients makes backprop keep the graph of units that this node does not train.
    adapted.requires_grad_(False)
    return AdaptedModel(adapted, tokenizer, units, identity, device, install(adapted), subspace)


def load_base(
    model: ModelConfig, num_labels: int, seed: int, path: str = "", task: LearningTask = TASKS["classification"]
) -> Checkpoint:
    """The model without an adapter; where the checkpoint lacks weights, with the random ones of `load_model`."""
    device = find_device(model.device)
    with seeded(seed, device):
        return load_checkpoint(model, task, num_labels, device, path)


def save_adapter(adapted: AdaptedModel, tensors: Mapping[str, Tensor], folder: Path, whole: bool = True) -> None:
    """Write `tensors` into the model, then adapter and tokenizer into `folder` for `peft.PeftModel.from_pretrained`.

    whole: False for the adapter's weights alone, beside files that are there already; a tenth of the time.
    """
    adapted.load_tensors(tensors)
    plain = adapted.subspace.plain()
    if not whole:
        # "auto" would ask the Hub whether the vocabulary of the base model has grown.
        own = get_peft_model_state_dict(adapted.model, state_dict=plain, save_embedding_layers=False)
        folder.mkdir(exist_ok=True)
        save_file({name: t.detach().cpu().clone() for name, t in own.items()}, folder / WEIGHTS, {"format": "pt"})
        return
    adapted.model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=plain)
    adapted.tokenizer.save_pretrained(str(folder))
