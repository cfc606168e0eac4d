"""The README.md beside an adapter, written from its run as the Hugging Face Hub wants a model card. Reads no file, and
computes nothing about learning.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from spry_app.config import RunConfig
from spry_app.methods import Method
from spry_app.server.record import Round

_LOAD = "## How to load it"


def card(
    config: RunConfig,
    method: Method,
    rounds: Sequence[Round],
    labels: Sequence[str],
    base: str,
    versions: Mapping[str, str],
) -> str:
    """base: the base model as others know it. rounds: all so far. versions: package -> version."""
    scored = [line for line in rounds if line.accuracy is not None]
    data = ModelCardData(
        base_model=None if Path(base).is_absolute() else base,
        library_name="peft",
        pipeline_tag="text-classification",
        tags=["spry", "federated-learning", "forward-gradient", config.adapter.kind],
        metrics=["accuracy"],
        **_index(config, scored),
    )
    last = rounds[-1]
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {base} with {config.adapter.kind}, by {config.method}\n",
        f"Trained by federated learning with Spry: {last.round} rounds, {last.asked} clients asked in the last.\n",
        f"- **Base model**: `{base}`{_revision(config)}, {_format(config)}\n"
        f"- **Data**: `{config.data.source}`, dealt to clients by `{config.data.partition}`; {len(labels)} classes: "
        f"{', '.join(f'`{label}`' for label in labels)}\n"
        f"- **Method**: `{config.method}` ({method.paper})\n"
        f"- **Adapter**: {_adapter(config)}\n",
        f"## Results\n\n{_results(scored)}",
        f"## Costs\n\n{_costs(last)}",
        f"## Versions\n\n{', '.join(f'{name} {version}' for name, version in versions.items())}\n",
        f"{_LOAD}\n\n{_lines(base, config, len(labels))}",
    ]
    return "\n".join(parts)


def merged_card(adapters: str, base: str) -> str:
    """Of the model that an adapter was merged into, from the adapter's card ("" where it has none)."""
    own = ModelCard(adapters or "---\nmetrics:\n- accuracy\n---\n\n# A merged model\n", ignore_metadata_errors=True)
    data: Any = own.data
    data.library_name, data.pipeline_tag = "transformers", "text-classification"
    if getattr(data, "base_model", None):
        data.base_model_relation = "finetune"
    text = own.text.split(_LOAD)[0].strip()
    said = f"The adapter is merged into `{base}`, loaded in full precision."
    load = 'from transformers import pipeline\n\nprint(pipeline("text-classification", "<this folder>")("some text"))'
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n\n{said}\n\n{_LOAD}\n\n```python\n{load}\n```\n"


def _index(config: RunConfig, scored: Sequence[Round]) -> dict[str, Any]:
    if not scored:
        return {}
    result = EvalResult(
        task_type="text-classification",
        dataset_type=config.data.source,
        dataset_name=config.data.source,
        metric_type="accuracy",
        metric_value=round(float(scored[-1].accuracy or 0.0), 4),
    )
    return {"eval_results": [result], "model_name": f"spry-{config.method}"}


def _revision(config: RunConfig) -> str:
    return f" at `{config.model.revision}`" if config.model.revision else ""


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
    rows = [f"| {name} | {line.accuracy:.4f} | {line.loss or 0.0:.4f} |" for name, line in named.items()]
    return "\n".join(["| | accuracy | loss |", "| --- | --- | --- |", *rows]) + "\n"


def _costs(last: Round) -> str:
    lines = [
        f"- sent to clients {last.mib_down:.2f} MiB, received from them {last.mib_up:.2f} MiB",
        f"- {last.forwards:.0f} forward passes of one example, {last.seconds:.0f} s",
    ]
    if last.epsilon is not None:
        lines.append(f"- privacy: epsilon {last.epsilon:.3g}")
    return "\n".join(lines) + "\n"


def _lines(base: str, config: RunConfig, labels: int) -> str:
    revision = f', revision="{config.model.revision}"' if config.model.revision else ""
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained("{base}", num_labels={labels}{revision})
model = PeftModel.from_pretrained(base, "<this folder>").eval()
```
"""
