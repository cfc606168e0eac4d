"""What is learned: how rows become tensors, and how a model's answers are judged. One file a task."""

from spry_app.config import DataConfig, kebab
from spry_app.errors import SpryError
from spry_app.plugins import look_up
from spry_app.tasks.causal_lm import CAUSAL_LM
from spry_app.tasks.classification import CLASSIFICATION
from spry_app.tasks.encoded import IGNORED, Encoded
from spry_app.tasks.multiple_answers import MULTIPLE_ANSWERS
from spry_app.tasks.question_answering import QUESTION_ANSWERING
from spry_app.tasks.task import LearningTask, Model, Sums

TASKS: dict[str, LearningTask] = {
    "classification": CLASSIFICATION,
    "causal-lm": CAUSAL_LM,
    "multiple-answers": MULTIPLE_ANSWERS,
    "question-answering": QUESTION_ANSWERING,
}
"""data.task -> the task."""


def task_keys() -> frozenset[str]:
    """The keys of `data` that some task of the table uses and others may not."""
    return frozenset[str]().union(*(task.keys for task in TASKS.values()))


def get_task(config: DataConfig) -> LearningTask:
    """The task of a run. Raises SpryError where `data.task` names none, or a key is set that it does not use."""
    task, usual = _find(config.task), DataConfig()
    others = task_keys() - task.keys
    for name in DataConfig.model_fields:
        got, key = getattr(config, name), kebab(name)
        if key in others and got != getattr(usual, name):
            raise SpryError(
                f"data.{key} is {got!r}, which data.task {config.task!r} does not use; leave it "
                f"{getattr(usual, name)!r}."
            )
    return task


def task_of_adapter(peft_type: str | None) -> LearningTask:
    """The first task whose adapters PEFT saves with this type; classification where there is none."""
    return next((task for task in TASKS.values() if task.peft_type == peft_type), CLASSIFICATION)


def _find(name: str) -> LearningTask:
    task = look_up(name, TASKS, "data.task")
    if not isinstance(task, LearningTask):
        raise SpryError(f"data.task={name!r} is a {type(task).__name__}; it must be a spry_app.tasks.LearningTask.")
    return task


__all__ = ["IGNORED", "TASKS", "Encoded", "LearningTask", "Model", "Sums", "get_task", "task_keys", "task_of_adapter"]
