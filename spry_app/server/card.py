"""The README.md beside an adapter, written from its run as the Hugging Face Hub wants a model card. Reads no file, and
computes nothing about learning.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.pipelines import SUPPORTED_TASKS

from spry_app.config import RunConfig
from spry_app.methods import Method
from spry_app.server.record import Round
from spry_app.tasks import LearningTask, get_task

_LOAD = "## How to load it"


def card(
    config: RunConfig,
    method: Method,
    rounds: Sequence[Round],
    labels: Sequence[str],
    base: str,
    versions: Mapping[str, str],
    pooled: bool = False,
) -> str:
    """base: the base model as others know it. rounds: all so far. versions: package -> version. pooled: whether it is
    trained on a copy of the base model that takes the mean of all tokens.
    """
    scored, task = [line for line in rounds if line.main is not None], get_task(config.data)
    data = ModelCardData(
        base_model=None if Path(base).is_absolute() else base,
        library_name="peft",
        pipeline_tag=task.hub_task,
        tags=["spry", "federated-learning", "forward-gradient", config.adapter.kind],
        metrics=[task.main_metric],
        **_index(config, scored, task),
    )
    last = rounds[-1]
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {base} with {config.adapter.kind}, by {config.method}\n",
        f"Trained by federated learning with Spry: {last.round} rounds, {last.asked} clients asked in the last.\n",
        f"- **Base model**: `{base}`{_revision(config)}, {_format(config)}{_mean(pooled)}\n"
        f"- **Data**: `{_public(config.data.source)}`, dealt to clients by `{config.data.partition}`, for "
        f"`{config.data.task}`{_classes(labels)}\n"
        f"- **Method**: `{config.method}` ({method.paper})\n"
        f"- **Adapter**: {_adapter(config)}\n",
        f"## Results\n\n{_results(scored)}",
        f"## Costs\n\n{_costs(last)}",
        f"## Versions\n\n{', '.join(f'{name} {version}' for name, version in versions.items())}\n",
        f"{_LOAD}\n\n{_lines(base, config, task, len(labels), pooled)}",
    ]
    return "\n".join(parts)


def merged_card(adapters: str, base: str, task: LearningTask) -> str:
    """Of the model that an adapter was merged into, from the adapter's card ("" where it has none)."""
    own = ModelCard(adapters or "---\nmetrics:\n- accuracy\n---\n\n# A merged model\n", ignore_metadata_errors=True)
    data: Any = own.data
    data.library_name, data.pipeline_tag = "transformers", task.hub_task
    if getattr(data, "base_model", None):
        data.base_model_relation = "finetune"
    text = own.text.split(_LOAD)[0].strip()
    said = f"The adapter is merged into `{base}`, loaded in full precision."
    load = "from transformers import " + loaded_by(task, "<this folder>")
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n\n{said}\n\n{_LOAD}\n\n```python\n{load}\n```\n"


def loaded_by(task: LearningTask, folder: str) -> str:
    """A name of transformers, and on a line of its own what to do with it."""
    if task.hub_task in SUPPORTED_TASKS:
        return f'pipeline\n\nsay = pipeline("{task.hub_task}", "{folder}")'
    name = task.auto_model.__name__
    return f'{name}\n\nmodel = {name}.from_pretrained("{folder}")'


def _classes(labels: Sequence[str]) -> str:
    return f"; {len(labels)} classes: {', '.join(f'`{label}`' for label in labels)}" if labels else ""


def _index(config: RunConfig, scored: Sequence[Round], task: LearningTask) -> dict[str, Any]:
    if not scored:
        return {}
    result = EvalResult(
        task_type=task.hub_task,
        dataset_type=_public(config.data.source),
        dataset_name=_public(config.data.source),
        metric_type=task.main_metric,
        metric_value=round(float(scored[-1].main or 0.0), 4),
    )
    return {"eval_results": [result], "model_name": f"spry-{config.method}"}


def _public(source: str) -> str:
    """Of a file its name alone: where it lay is nobody's business."""
    return Path(source).name if Path(source).exists() else source


def _revision(config: RunConfig) -> str:
    return f" at `{config.model.revision}`" if config.model.revision else ""


def _mean(pooled: bool) -> str:
    return ", on the mean of all tokens" if pooled else ""


def _format(config: RunConfig) -> str:
    quantised = "" if config.model.quantization == "none" else f", its linear layers in {config.model.quantization}"
    return f"{config.model.dtype}{quantised}"


def _adapter(config: RunConfig) -> str:
    """The keys of `adapter` that are not their defaults."""
    default = RunConfig.defaults()
    changed = {k: v for k, v in config.flat().items() if k.startswith("adapter.") and v != default[k]}
    own = {"adapter.kind": config.adapter.kind} | changed
    return ", ".join(f"`{key}={value!r}`" for key, value in own.items() if key != "adapter.path")


def _results(scored: Sequence[Round]) -> str:
    if not scored:
        return "It was not evaluated.\n"
    named = {"before training": scored[0], f"after round {scored[-1].round}": scored[-1]}
    rows = [f"| {name} | {line.main:.4f} | {line.loss or 0.0:.4f} |" for name, line in named.items()]
    return "\n".join([f"| | {scored[0].main_metric} | loss |", "| --- | --- | --- |", *rows]) + "\n"


def _costs(last: Round) -> str:
    lines = [
        f"- sent to clients {last.mib_down:.2f} MiB, received from them {last.mib_up:.2f} MiB",
        f"- {last.forwards:.0f} forward passes of one example, {last.seconds:.0f} s",
    ]
    if last.epsilon is not None:
        lines.append(f"- privacy: epsilon {last.epsilon:.3g}")
    return "\n".join(lines) + "\n"


def _lines(base: str, config: RunConfig, task: LearningTask, labels: int, pooled: bool) -> str:
    own, revision, before = config.model.revision, "", ""
    if pooled:
        option = f" --revision {own}" if own else ""
        before = f"Its classifier sees the mean of all tokens, which this makes of `{base}`:\n\n"
        before += f"```\nspry mean-pool {base} mean-pooled{option}\n```\n\n"
        base = "mean-pooled"
    elif own:
        revision = f', revision="{own}"'
    name, classes = task.auto_model.__name__, f", num_labels={labels}" if labels else ""
    return f"""{before}```python
from peft import PeftModel
from transformers import {name}

base = {name}.from_pretrained("{base}"{classes}{revision})
model = PeftModel.from_pretrained(base, "<this folder>").eval()
```
"""
