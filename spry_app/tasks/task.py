"""What a task is: a value made of independent choices. It knows of no federation, and of a model only what it answers.

Two functions that take rows come in every task: `loss` of a micro-batch, which is differentiated, and `judge`, which
scores rows and is not.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spry_app.config import DataConfig
from spry_app.tasks.encoded import Encoded

Sums = Mapping[str, float]
"""Numbers that add up over batches and over nodes: "loss", "examples", and those of LearningTask.sums."""
Metric = Callable[[Sums], float]
Names = tuple[str, ...]


class Model(Protocol):
    """A model at given tensors, dropout masks and hidden states to begin with: what a loss may ask of it."""

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What its head says, fp32: (rows, classes); of extractive question answering, (rows, tokens, 2)."""

    def next_token_loss(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Of a causal language model: mean over the labels (rows, tokens) but the first, -100 left out."""

    def next_token_scores(self, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same, not yet summed: the loss of each token, and whether it is the likeliest; (rows, tokens) each."""


def ratio(amount: str, whole: str) -> Metric:
    """`amount` of `whole`: from 0 to 1, whatever nodes say within the bounds of their sums."""
    return lambda sums: within(sums[amount] / sums[whole])


def within(value: float) -> float:
    """From 0 to 1."""
    return min(max(value, 0.0), 1.0)


def _no_names(_config: DataConfig) -> Names:
    return ()


def _as_it_is(_model: Any, _config: DataConfig) -> None:
    return None


@dataclass(frozen=True, eq=False)
class LearningTask:
    """A row of the table TASKS, or an object of the user's (`data.task = "package.module:object"`)."""

    noun: str
    """Of its models, in errors: "sequence-classification"."""
    auto_model: Any
    """The Auto class of transformers that loads them."""
    peft_type: str
    """PEFT's name for the task, in the configuration of a saved adapter."""
    hub_task: str
    """The Hub's name for the task, on a model card; also that of a pipeline of transformers, where there is one."""
    keys: frozenset[str]
    """Which of the keys of `data` that belong to tasks (tasks.task_keys) it uses; others must be left alone."""
    columns: Callable[[Dataset, DataConfig, Names, str], Mapping[str, Any]]
    """(rows as they come, config, names of the classes, where they are from) -> columns of Arrow by the names that
    `encode` reads; "label" (int64) if rows can be dealt out by it. Raises SpryError for rows that will not do."""
    encode: Callable[[Dataset, PreTrainedTokenizerBase, DataConfig, bool], Encoded]
    """(rows with these columns, tokenizer, config, whether they are to be trained on) -> tokens. Encoded.task is this
    value."""
    loss: Callable[[Model, Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
    """(model, inputs, targets) -> mean over the terms (Encoded.terms) of these rows. Must bear dual numbers."""
    judge: Callable[[Model, Encoded, Sequence[int]], Sums]
    """(model, rows, numbers of some of them) -> sums over them: "loss", "examples", and each of `sums`."""
    sums: Mapping[str, tuple[float, float]]
    """Name -> the least and the most that one example adds to it: what a node says beyond that is refused. Names
    travel, so "loss" and the like are taken."""
    metrics: Mapping[str, Metric]
    """Name -> what it is of the sums, left out where it divides by zero. Whatever else nodes may say within the bounds
    of `sums` must give a number."""
    main_metric: str
    """Of `metrics`, from 0 to 1, the larger the better: shown in progress, drawn, and what a run can be ended by."""
    loss_over: str = "examples"
    """The sum that the loss is a mean over."""
    head: bool = True
    """Whether what its models have beside the backbone is new, and so trained in full."""
    names: Callable[[DataConfig], Names] = _no_names
    """Names of the classes where the config gives them."""
    classes: Callable[[Dataset, DataConfig, str], Names] | None = None
    """Names of the classes of rows as they come; None where there are no classes."""
    prepare: Callable[[Any, DataConfig], None] = _as_it_is
    """(models.AdaptedModel, config), once the model is loaded: raises SpryError where it cannot learn the task."""

    def report(self, sums: Sums) -> dict[str, float]:
        """Every metric of sums over one example or more, but those of nothing: what would be divided by zero."""
        found: dict[str, float] = {}
        for name, metric in self.metrics.items():
            with suppress(ZeroDivisionError):
                found[name] = metric(sums)
        return found
