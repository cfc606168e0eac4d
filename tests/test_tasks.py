"""The table of tasks: who uses which keys, how sums become metrics, and tasks of the user's own."""

import dataclasses
import itertools

import pytest
from datasets import Dataset
from tiny_causal import byte_tokenizer

from spry_app.config import DataConfig, RunConfig
from spry_app.errors import SpryError
from spry_app.protocol import MOST_EXAMPLES
from spry_app.tasks import TASKS, get_task, task_keys

EVERY = pytest.mark.parametrize("name", TASKS)
OTHERS = {"unlabelled": "drop"}
"""Values of keys that take but a few."""
OWN = dataclasses.replace(TASKS["classification"], noun="my own")
"""A task of the user's, as tests/test_tasks.py brings it."""


@EVERY
def test_a_task_is_found_by_its_name(name: str) -> None:
    assert get_task(DataConfig(task=name)) is TASKS[name]


def test_a_task_of_ones_own_goes_in_by_its_path() -> None:
    assert get_task(DataConfig(task="test_tasks:OWN")) is OWN
    with pytest.raises(SpryError, match=r"data\.task='test_tasks:EVERY' is a MarkDecorator; it must be a spry_app"):
        get_task(DataConfig(task="test_tasks:EVERY"))
    with pytest.raises(SpryError, match=r"data\.task='classificaton' is not known\. Did you mean 'classification'"):
        get_task(DataConfig(task="classificaton"))


@EVERY
def test_the_keys_of_a_task_are_keys_of_the_run_config(name: str) -> None:
    assert {f"data.{key}" for key in TASKS[name].keys} <= RunConfig.defaults().keys()


@EVERY
def test_a_key_that_a_task_does_not_use_is_refused(name: str) -> None:
    for key in task_keys() - TASKS[name].keys:
        usual = RunConfig.defaults()[f"data.{key}"]
        other = not usual if isinstance(usual, bool) else OTHERS.get(key, usual + type(usual)("7"))
        config = RunConfig.from_flower({"data.task": name, f"data.{key}": other}).data
        with pytest.raises(SpryError, match=rf"data\.{key} is {other!r}, which data\.task '{name}' does not use"):
            get_task(config)


@EVERY
def test_metrics_are_numbers_wherever_the_sums_are_within_their_bounds(name: str) -> None:
    """Or one node could end a run by what it says of its held-out rows. The main metric is a part of the whole."""
    task = TASKS[name]
    assert task.main_metric in task.metrics and task.loss_over in {"examples", *task.sums}
    for examples, loss in itertools.product((1, MOST_EXAMPLES), (-1e12, 0.0, 1e12)):
        for sides in itertools.product((0, 1), repeat=len(task.sums)):
            sums = {key: bounds[side] * examples for side, (key, bounds) in zip(sides, task.sums.items(), strict=True)}
            found = task.report({**sums, "loss": loss * examples, "examples": examples})
            assert all(isinstance(value, int | float) for value in found.values())
            assert 0 <= found.get(task.main_metric, 0.0) <= 1  # left out where there was nothing to be right about


@EVERY
def test_no_rows_encode_to_nothing(name: str) -> None:
    task, columns = TASKS[name], ("text", "label", "together", "question", "context", "answers", "answer_start")
    rows = Dataset.from_dict({column: [] for column in columns})
    empty = task.encode(rows, byte_tokenizer(), DataConfig(task=name), False)
    assert len(empty) == 0 and (empty.cut, empty.dropped) == (0, 0) and empty.task is task
