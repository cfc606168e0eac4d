"""Classification of a text or a pair of texts: tokens, loss, score. Never a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from spry_app.autodiff.transfer import onto
from spry_app.config import DataConfig
from spry_app.tasks import classes
from spry_app.tasks.columns import require, text
from spry_app.tasks.encoded import Encoded
from spry_app.tasks.task import LearningTask, Model, Names, ratio


def _require(raw: Dataset, config: DataConfig, where: str) -> None:
    wanted = {"data.text-field": config.text_field, "data.label-field": config.label_field}
    if config.text_pair_field:
        wanted["data.text-pair-field"] = config.text_pair_field
    require(raw, wanted, where)


def _classes(raw: Dataset, config: DataConfig, where: str) -> Names:
    _require(raw, config, where)
    return classes.names_of(raw, config, where)


def _columns(raw: Dataset, config: DataConfig, names: Names, where: str) -> dict[str, Any]:
    """text, text_pair (pairs only), label (id)."""
    _require(raw, config, where)
    columns = {"text": text(raw, "data.text-field", config.text_field, where)}
    if config.text_pair_field:
        columns["text_pair"] = text(raw, "data.text-pair-field", config.text_pair_field, where)
    return columns | {"label": classes.ids(raw, config.label_field, names, where)}


def encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenise the columns text and, for pairs, text_pair; rows over `max_length` tokens are cut and counted."""
    texts = [dataset[name][:] for name in ("text", "text_pair") if name in dataset.column_names]
    if not len(dataset):
        return Encoded({}, {"labels": []}, 0, tokenizer, CLASSIFICATION)
    features = tokenizer(*texts, verbose=False)
    cut = sum(len(tokens) > max_length for tokens in features["input_ids"])
    if cut:
        features = tokenizer(*texts, truncation=True, max_length=max_length)
    return Encoded(dict(features), {"labels": dataset["label"][:]}, cut, tokenizer, CLASSIFICATION)


def _encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, _training: bool) -> Encoded:
    return encode(dataset, tokenizer, config.max_length)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy, float32. Shapes: (rows, classes), (rows,)."""
    return cross_entropy(logits.float(), onto(labels, logits.device))


def correct(logits: Tensor, labels: Tensor) -> int:
    """How many rows have their label as the largest logit."""
    return int((logits.argmax(-1) == labels).sum())


def _loss(model: Model, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    return loss(model.logits(inputs), targets["labels"])


@torch.no_grad()
def _judge(model: Model, rows: Encoded, part: Sequence[int]) -> dict[str, float]:
    logits = model.logits(rows.inputs(part))
    labels = rows.aims(part)["labels"].to(logits.device)
    return {
        "loss": loss(logits, labels).item() * len(part),
        "correct": correct(logits, labels),
        "examples": len(part),
    }


CLASSIFICATION = LearningTask(
    noun="sequence-classification",
    auto_model=AutoModelForSequenceClassification,
    peft_type="SEQ_CLS",
    hub_task="text-classification",
    keys=frozenset({"text-field", "text-pair-field", "label-field", "num-labels", "label-names", "unlabelled"}),
    columns=_columns,
    encode=_encode,
    loss=_loss,
    judge=_judge,
    sums={"correct": (0, 1)},
    metrics={"accuracy": ratio("correct", "examples")},
    main_metric="accuracy",
    names=classes.configured_names,
    classes=_classes,
)
