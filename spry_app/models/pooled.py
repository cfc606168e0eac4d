"""Whether a run's classifier is to see the mean of all tokens, and the copy of its checkpoint that does, made once a
machine. How the mean becomes weights is in pooling.py.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from spry_app.config import ModelConfig
from spry_app.errors import SpryError
from spry_app.models.pooling import FAMILIES, sees_mean, write_mean_pooled
from spry_app.models.randomness import seeded
from spry_app.models.room import free_bytes, weight_bytes
from spry_app.models.sources import public_name
from spry_app.stored import made_once, name_of
from spry_app.tasks import LearningTask

logger = logging.getLogger(__name__)

_SAYS = "1_Pooling/config.json"
"""Where sentence-transformers keeps what an encoder's tokens are made into."""
_FLAGS = "pooling_mode_"
_FORMAT = 1
"""Of the copies; another one where write_mean_pooled writes others."""
_COPY = "-mean-[0-9a-f]{32}"


def wants_mean(config: ModelConfig, task: LearningTask, location: str, settings: PreTrainedConfig) -> bool:
    """Whether the checkpoint at `location`, with these `settings`, is to have one more block, as model.pooling says.

    Not one that has it already. Raises SpryError where that is asked of a model or task that cannot have it.
    """
    if config.pooling == "first" or sees_mean(settings):
        return False
    able = settings.model_type in FAMILIES and task.auto_model is AutoModelForSequenceClassification
    if config.pooling == "auto":
        return able and _trained_for_mean(location, settings, config.revision)
    if not able:
        raise SpryError(
            f'model.pooling is "mean", which is for classifiers of the families {", ".join(FAMILIES)}: '
            f"{config.name!r} is of the family {settings.model_type!r}, and the task is for {task.noun} models. "
            'Set it to "auto".'
        )
    return True


def copy_of(config: ModelConfig, location: str, skeleton: PreTrainedModel) -> str:
    """Folder of the checkpoint at `location` with one more block; written now if this machine has none of it yet.

    skeleton: the model with that block, of which shapes and the commit are read.
    """
    commit = getattr(skeleton.config, "_commit_hash", None) or config.revision
    short = Path(public_name(config.name)).resolve().name
    name = name_of(f"{short}-mean", {"format": _FORMAT, "commit": commit, **_files(location)})

    def write(folder: Path) -> None:
        needed, free = 2 * weight_bytes(skeleton, (), "none", "float32"), free_bytes(torch.device("cpu"))
        if needed > free:
            raise SpryError(
                f"A copy of {config.name} that takes the mean of all tokens needs {needed / 2**30:.2f} GiB of memory "
                f"while it is made, and {free / 2**30:.2f} GiB are free: make it elsewhere with `spry mean-pool` and "
                'set model.name to it, or set model.pooling to "first".'
            )
        logger.info("Writing a copy of %s that takes the mean of all tokens, once on this machine.", config.name)
        with seeded(0, torch.device("cpu")):  # what is drawn for a head that is not written
            write_mean_pooled(location, folder, commit)

    return str(made_once("models", name, write))


def is_copy(name: str) -> bool:
    """Whether the base model of an adapter is such a copy, of this machine or another."""
    return re.fullmatch(f".+{_COPY}", Path(name).name) is not None


def _files(location: str) -> Mapping[str, Any]:
    """What tells that a checkpoint is another one: of a Hub name its commit does."""
    folder = Path(location)
    if not folder.is_dir():
        return {"name": location}
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return {
        "folder": str(folder.resolve()),
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
    }


def _trained_for_mean(location: str, settings: PreTrainedConfig, revision: str) -> bool:
    """Whether the mean of the tokens, and nothing beside it, is what the checkpoint says an encoder makes of a text."""
    file = Path(location, _SAYS)
    if not Path(location).is_dir():
        try:
            commit = getattr(settings, "_commit_hash", None) or revision or None
            file = Path(hf_hub_download(location, _SAYS, revision=commit))
        except EntryNotFoundError:  # the Hub says so, or it is not asked and no cache has it
            if try_to_load_from_cache(location, _SAYS, revision=commit) is not _CACHED_NO_EXIST:
                logger.warning(
                    "The Hub is not asked, and this machine's cache does not tell whether %s is to see the mean of all "
                    'tokens (%s): it sees the first. Set model.pooling to "mean" or "first".',
                    location,
                    _SAYS,
                )
            return False
    if not file.is_file():
        return False
    said: dict[str, Any] = json.loads(file.read_text())
    mode = said.get("pooling_mode")  # sentence-transformers 5 and later
    modes = [mode] if mode else [key for key, value in said.items() if key.startswith(_FLAGS) and value is True]
    return modes in (["mean"], [["mean"]], [f"{_FLAGS}mean_tokens"])
