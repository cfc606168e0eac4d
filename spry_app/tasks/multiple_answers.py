"""Questions with several answers, each right or wrong, as in MultiRC (ACL Anthology N18-1023): an answer is a row that
is classified like any text, and scored with the others to its question. Never a model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from spry_app.config import DataConfig
from spry_app.errors import SpryError
from spry_app.tasks.classification import CLASSIFICATION, loss
from spry_app.tasks.columns import require, whole
from spry_app.tasks.encoded import Encoded
from spry_app.tasks.task import LearningTask, Model, Names, Sums, ratio, within


def _columns(raw: Dataset, config: DataConfig, names: Names, where: str) -> dict[str, Any]:
    """Those of classification; together, what tells a question from the others."""
    if len(names) != 2:
        raise SpryError(
            f"data.task is 'multiple-answers', whose two classes are wrong and right, in this order; {where} has "
            f"{len(names)} ({', '.join(names[:12])}): see data.label-field and data.label-names."
        )
    require(raw, {"data.question-field": config.question_field}, where)
    question = whole(raw, "data.question-field", config.question_field, where)
    if pa.types.is_nested(question.type):
        holds = raw.features[config.question_field]
        raise SpryError(
            f"data.question-field {config.question_field!r} of {where} holds {holds}; it must hold numbers or text."
        )
    return {**CLASSIFICATION.columns(raw, config, names, where), "together": question}


def _encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, training: bool) -> Encoded:
    numbers: dict[str | int, int] = {}
    together = [numbers.setdefault(question, len(numbers)) for question in dataset["together"][:]]
    rows = CLASSIFICATION.encode(dataset, tokenizer, config, training)
    return replace(rows, task=MULTIPLE_ANSWERS, together=together)


@torch.no_grad()
def _judge(model: Model, rows: Encoded, part: Sequence[int]) -> Sums:
    """said, right, both: answers that the model says are right, that are, and that it rightly says so of. exact:
    questions of which it knows that of every answer.
    """
    logits, labels = model.logits(rows.inputs(part)), rows.aims(part)["labels"]
    said = logits.argmax(-1).cpu()
    known: dict[int, bool] = {}
    for index, knows in zip(part, (said == labels).tolist(), strict=True):
        known[rows.together[index]] = known.get(rows.together[index], True) and knows
    return {
        "loss": loss(logits, labels).item() * len(part),
        "examples": len(part),
        "correct": int((said == labels).sum()),
        "said": int(said.sum()),
        "right": int(labels.sum()),
        "both": int((said & labels).sum()),
        "questions": len(known),
        "exact": sum(known.values()),
    }


MULTIPLE_ANSWERS: LearningTask = replace(
    CLASSIFICATION,
    keys=CLASSIFICATION.keys | {"question-field"},
    columns=_columns,
    encode=_encode,
    judge=_judge,
    sums=dict.fromkeys(("correct", "said", "right", "both", "questions", "exact"), (0, 1)),
    metrics={
        "f1": lambda sums: within(2 * sums["both"] / (sums["said"] + sums["right"])),
        "exact": ratio("exact", "questions"),
        "accuracy": ratio("correct", "examples"),
    },
    main_metric="f1",
)
"""Its metrics are MultiRC's: F1 of the right answers over all answers ("F1a"), and the part of the questions with every
answer known ("EM").
"""
