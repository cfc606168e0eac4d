"""Load and quantise a checkpoint for a task; adapters are attached elsewhere."""

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from spry_app.config import ModelConfig
from spry_app.errors import SpryError
from spry_app.models.pooled import copy_of, wants_mean
from spry_app.models.pooling import add_block, write_mean_pooled
from spry_app.models.room import check_room
from spry_app.models.sources import EMBEDDED, find, public_name
from spry_app.offline import advice
from spry_app.tasks import TASKS, LearningTask

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_QUANTIZERS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@dataclass(frozen=True)
class Checkpoint:
    """A frozen model in eval mode; `head` names its children outside the backbone that the task makes new, if any.

    name, revision: what an adapter is to give as its base model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: tuple[str, ...]
    name: str
    revision: str


def load_checkpoint(
    config: ModelConfig, task: LearningTask, num_labels: int, device: torch.device, path: str = ""
) -> Checkpoint:
    """Load `path`, or else `config.name`, with the mean of all tokens before its head where model.pooling says so.

    Weights that the checkpoint lacks are drawn from torch's global generator.

    num_labels: classes of the task, 0 where it has none.
    """
    location, name, revision = find(config.name, path), public_name(config.name), config.revision
    quantizer = quantizer_of(config)
    with quiet(), explained(config, task, location):
        settings, pooled = settings_of(config, task, location, num_labels)
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision or None, trust_remote_code=False)
        _pad(tokenizer, settings)
        skeleton = _skeleton(settings, task)
        head = head_of(skeleton, task)
        check_room(skeleton, head, config, device)
        if pooled:
            location, revision = copy_of(config, location, skeleton), ""
            name = location
        if quantizer is not None and head:
            quantizer.llm_int8_skip_modules = list(head)
        model, report = task.auto_model.from_pretrained(
            location,
            revision=revision or None,
            config=settings,
            dtype=DTYPES[config.dtype],
            quantization_config=quantizer,
            # bitsandbytes quantises on the device; the rest is drawn on the CPU, where all nodes draw the same.
            device_map={"": device if quantizer is not None else "cpu"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,  # never a pickle
        )
    _warn_of_random_weights(report, head)
    model.eval().requires_grad_(False)
    if quantizer is None:
        model.to(device)
    else:
        importlib.import_module("spry_app.models.quantized").pass_tangents(model)
    return Checkpoint(model, tokenizer, head, name, revision)


def mean_pool(name: str, folder: Path, revision: str) -> None:
    """Write a checkpoint, named as model.name and model.revision do, as `write_mean_pooled` does. Raises SpryError."""
    location = find(name)
    with quiet(), explained(ModelConfig(name=name, revision=revision), TASKS["classification"], location):
        write_mean_pooled(location, folder, revision)


def find_device(name: str) -> torch.device:
    """ "auto" is the first GPU, or else the CPU. Raises SpryError if there is no such device."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda", 0) if cuda else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise SpryError(f'model.device is {name!r}; allowed are "auto", "cpu", "cuda" and "cuda:<index>".')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SpryError(f'model.device is {name!r}, and torch finds no such GPU here; set it to "auto" or "cpu".')
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def quantizer_of(config: ModelConfig) -> BitsAndBytesConfig | None:
    """What transformers is to quantise with. Raises SpryError where it is not installed."""
    if config.quantization == "none":
        return None
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise SpryError(
            f"model.quantization is {config.quantization!r}, which needs bitsandbytes ({error}). "
            'Run `pip install bitsandbytes`, or set model.quantization to "none".'
        ) from error
    row = _QUANTIZERS[config.quantization]
    return BitsAndBytesConfig(bnb_4bit_compute_dtype=DTYPES[config.dtype], **row)  # type: ignore[no-untyped-call]


def _pad(tokenizer: PreTrainedTokenizerBase, settings: PreTrainedConfig) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ValueError("its tokenizer has no padding, end-of-text or unknown token to pad with")
    settings.pad_token_id = tokenizer.pad_token_id
    settings.use_cache = False


def settings_of(
    config: ModelConfig, task: LearningTask, location: str, num_labels: int
) -> tuple[PreTrainedConfig, bool]:
    """transformers' configuration of the model that is trained, and whether it has a block more than the checkpoint
    (models.pooled). Raises ValueError for one that is quantised already.
    """
    classes = {"num_labels": num_labels} if num_labels else {}
    settings: PreTrainedConfig = AutoConfig.from_pretrained(
        location, revision=config.revision or None, trust_remote_code=False, **classes
    )
    if getattr(settings, "quantization_config", None):
        raise ValueError("it is quantised already; take the full checkpoint and set model.quantization")
    pooled = wants_mean(config, task, location, settings)
    if pooled:
        add_block(settings)
    return settings, pooled


def _skeleton(settings: PreTrainedConfig, task: LearningTask) -> PreTrainedModel:
    """The model without its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = task.auto_model.from_config(settings, trust_remote_code=False)
    return model


def head_of(skeleton: PreTrainedModel, task: LearningTask) -> tuple[str, ...]:
    """Names of its children outside the backbone that the task makes new. Raises ValueError where there is none."""
    if not task.head:
        return ()
    head = tuple(
        name
        for name, child in skeleton.named_children()
        if child is not skeleton.base_model and any(True for _ in child.parameters())
    )
    if skeleton.base_model is skeleton or not head:
        raise ValueError(f"its architecture has no {task.noun} head of its own beside a backbone")
    return head


def _warn_of_random_weights(report: dict[str, Any], head: tuple[str, ...]) -> None:
    names = {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}
    unexpected = sorted(name for name in names if name.split(".")[0] not in head)
    if unexpected:
        shown = ", ".join(unexpected[:5]) + (", ..." if len(unexpected) > 5 else "")
        logger.warning(
            "The checkpoint lacks %d tensors below the head (%s). They are random, stay so, and are not part of the "
            "saved adapter.",
            len(unexpected),
            shown,
        )


def _download(name: str, revision: str) -> str:
    return f"hf download {name}" + (f" --revision {revision}" if revision else "")


@contextmanager
def explained(config: ModelConfig, task: LearningTask, location: str) -> Iterator[None]:
    """Errors of transformers become a SpryError that names model.name."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SpryError(
            f"model.name is {config.name!r}: no {task.noun} model could be loaded from {location!r} "
            f"({reason}). Allowed are a Hub name (owner/name, with model.revision if wanted), a local folder with "
            f"config.json, weights and tokenizer, or one of: {', '.join(EMBEDDED)}."
            f"{'' if Path(location).is_dir() else advice(_download(location, config.revision))}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no report of the missing head, which is expected, nor of what libraries will call by another
    name.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
