"""Mean pooling as weights: a sentence encoder as a plain checkpoint whose classifier sees the mean of its tokens.

Classifiers of BERT's family read the first token. Sentence encoders (all-MiniLM, E5, GTE) were trained for the mean of
all tokens, and their first one says little. One more block takes the mean: its attention looks at all tokens alike, and
its value is the token itself, so that every place holds the mean. What is written is an ordinary checkpoint of the same
class: PEFT, quantisers and pipelines need not know. Nothing is trained here, and where it lies is decided elsewhere.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from spry_app.errors import SpryError

SHARE = 1000.0
"""Of the mean, to 1 of the token that the residual connection adds to it."""
SLOPE = 0.2
"""Of the features before tanh, which is nearly straight there: they have mean 0 and variance 1."""
_MARK = "mean_pooling_block"
"""In a configuration: the number of the block that takes the mean."""
_NAMES: Mapping[str, tuple[str, Callable[[Any], nn.Linear], str]] = {
    "bert": ("bert", lambda model: model.bert.pooler.dense, "classifier."),
    "roberta": ("roberta", lambda model: model.classifier.dense, "classifier.out_proj."),
    "xlm-roberta": ("roberta", lambda model: model.classifier.dense, "classifier.out_proj."),
}
"""model_type -> its backbone, the map between that and tanh, and what is left to the task."""
FAMILIES = tuple(_NAMES)


def add_block(config: PreTrainedConfig) -> None:
    """Make room for the block that takes the mean, above all others. For FAMILIES alone."""
    setattr(config, _MARK, config.num_hidden_layers)
    config.num_hidden_layers += 1


def sees_mean(config: PreTrainedConfig) -> bool:
    """Whether a model has such a block."""
    return getattr(config, _MARK, None) is not None


def averaging_block(model: PreTrainedModel) -> str:
    """Name of the block that takes the mean; "" where the model has none, or was cut to fewer blocks."""
    if not sees_mean(model.config):
        return ""
    name = f"{model.base_model_prefix}.encoder.layer.{getattr(model.config, _MARK)}"
    return name if any(found == name for found, _ in model.named_modules()) else ""


def write_mean_pooled(location: str, folder: Path, revision: str = "") -> None:
    """Write the checkpoint at `location`, a folder or Hub name, with one more block into `folder`, absent or empty.

    The classifier sees tanh(SLOPE * x), x being the mean over all tokens that are not padding, brought to mean 0 and
    variance 1 over its features. Raises SpryError for other families, and where the folder is not free; else what
    transformers raises.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpryError(f"{folder} is not empty; name a folder that is absent or empty.")
    config = AutoConfig.from_pretrained(location, revision=revision or None, trust_remote_code=False)
    if config.model_type not in _NAMES or sees_mean(config):
        family = f"of the family {config.model_type!r}{', and sees the mean' if sees_mean(config) else ''}"
        raise SpryError(
            f"{location} is {family}; the mean of the tokens can be written once into {', '.join(FAMILIES)}. "
            "Others may be trained as they are."
        )
    add_block(config)
    model = AutoModelForSequenceClassification.from_pretrained(
        location,
        revision=revision or None,
        config=config,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(location, revision=revision or None, trust_remote_code=False)
    backbone, before_tanh, own = _NAMES[config.model_type]
    with torch.no_grad():
        _average(getattr(model, backbone).encoder.layer[-1])
        _scale(before_tanh(model), SLOPE)
    model.save_pretrained(folder, state_dict=_without(model.state_dict(), own))
    tokenizer.save_pretrained(folder)


def _average(block: Any) -> None:
    attention = block.attention
    for linear in (attention.self.query, attention.self.key, block.intermediate.dense, block.output.dense):
        _scale(linear, 0.0)
    _scale(attention.self.value, 1.0)
    _scale(attention.output.dense, SHARE)
    for norm in (attention.output.LayerNorm, block.output.LayerNorm):
        norm.weight.fill_(1.0)
        norm.bias.zero_()


def _scale(linear: nn.Linear, by: float) -> None:
    """Make it a multiple of the identity."""
    linear.weight.zero_().fill_diagonal_(by)
    linear.bias.zero_()


def _without(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
