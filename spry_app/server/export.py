"""From an adapter to a model that needs neither PEFT nor Spry: merged into its base, saved, pushed nowhere."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from transformers import AutoTokenizer

from spry_app.config import ModelConfig, RunConfig
from spry_app.errors import SpryError
from spry_app.models import load_base
from spry_app.models.checkpoint import quiet
from spry_app.models.pooled import is_copy
from spry_app.models.sources import known_as, public_name
from spry_app.server.adapter_folder import read_labels
from spry_app.server.card import loaded_by, merged_card
from spry_app.tasks import task_of_adapter

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CONFIG = "adapter_config.json"


def export(source: Path, output: Path, dtype: str = "bf16", model: str = "", force: bool = False) -> str:
    """Write model, tokenizer and card into `output`, all of it or nothing; returns how to load it.

    source: a run's folder, or an adapter's. model: a local copy of the base model. force: replace what is in `output`.
    Raises SpryError where there is no adapter, it cannot be merged, or `output` is not empty.
    """
    folder = source / "adapter" if (source / "adapter" / _CONFIG).is_file() else source
    settings, labels = _settings(folder), read_labels(folder)
    task = task_of_adapter(settings.task_type)
    if task.classes and not labels:
        raise SpryError(f'{folder} has no labels.json: write the names of the classes there, in order, as ["a", "b"].')
    _check_output(source, output, force)
    seed, config = _base(folder, settings, model)
    base = load_base(config, len(labels), seed, model, task)
    with quiet():
        adapted = PeftModel.from_pretrained(base.model, str(folder)).eval()
    merged = _merged(adapted, folder)
    if labels:
        merged.config.id2label = dict(enumerate(labels))
        merged.config.label2id = {label: index for index, label in enumerate(labels)}
    merged.config.use_cache = True
    fresh = output.with_name(output.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    with quiet():
        merged.to(DTYPES[dtype]).save_pretrained(fresh)
    AutoTokenizer.from_pretrained(folder).save_pretrained(fresh)
    readme = folder / "README.md"
    name = public_name(config.name) if config.pooling == "mean" else settings.base_model_name_or_path or config.name
    (fresh / "README.md").write_text(merged_card(readme.read_text() if readme.is_file() else "", name, task))
    if output.exists():
        shutil.rmtree(output)
    fresh.rename(output)
    return loaded_by(task, str(output)).splitlines()[-1].partition(" = ")[2]


@torch.no_grad()
def _merged(adapted: PeftModel, folder: Path) -> Any:
    """The base model with the adapter in its weights. Raises SpryError where it then says something else."""
    tokens = torch.arange(1, 5)[None] % adapted.config.vocab_size
    before = adapted(input_ids=tokens)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of normalisations, which PEFT calls no layer of its own
        merged: Any = cast(Any, adapted).merge_and_unload().eval()
    for name, part in list(merged.named_modules()):
        if isinstance(part, ModulesToSaveWrapper):  # PEFT 0.21 leaves the head in one for layernorm
            merged.set_submodule(name, part.modules_to_save[part.active_adapters[0]])
    after = merged(input_ids=tokens)[0]
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        raise SpryError(
            f"PEFT merges the adapter of {folder} ({adapted.peft_config['default'].peft_type}) into another model than "
            "it was: load the folder with PEFT, as its README.md says."
        )
    return merged


def _settings(folder: Path) -> PeftConfig:
    if not (folder / _CONFIG).is_file():
        raise SpryError(f"{folder} holds no adapter (no {_CONFIG}): give the folder of a run, or one that PEFT saved.")
    settings: PeftConfig = PeftConfig.from_pretrained(str(folder))
    if settings.is_prompt_learning:
        raise SpryError(
            f"{folder} holds virtual tokens ({settings.peft_type}), which are no part of a model's weights: load the "
            "folder with PEFT, as its README.md says."
        )
    return settings


def _check_output(source: Path, output: Path, force: bool) -> None:
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not force):
        raise SpryError(f"{output} is not empty: give another folder, or --force to replace all that is in it.")
    if output.resolve() in (source.resolve(), *source.resolve().parents):
        raise SpryError(f"{output} holds {source} itself: give another folder.")


def _base(folder: Path, settings: PeftConfig, model: str) -> tuple[int, ModelConfig]:
    """Seed and base model, in full precision: of the run where this is its adapter, else as PEFT's file names it.

    Whether the classifier sees the mean of all tokens, the adapter says: a local copy of its base may not.
    """
    run, their = folder.parent / "config.json", settings.base_model_name_or_path or ""
    pooling: Literal["mean", "first"] = "mean" if is_copy(their) else "first"
    if folder.name == "adapter" and run.is_file():
        told = json.loads(run.read_text())
        config = RunConfig.from_flower(told, chosen=told)
        name, revision, seed = config.model.name, config.model.revision, config.seed
    else:
        name, revision, seed = known_as(their), settings.revision or "", 0
        if pooling == "mean" and not (Path(their).is_dir() or model):
            raise SpryError(
                f"{folder} is an adapter of {their}, which is not on this machine: a copy of a sentence encoder that "
                "takes the mean of all tokens. The README.md of the adapter says how `spry mean-pool` makes one: give "
                "its folder, or the encoder's, by --model."
            )
    return seed, ModelConfig(name=name, revision=revision, device="cpu", pooling=pooling)
