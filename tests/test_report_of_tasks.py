"""A report finds the metrics of whatever task a run had, and says which of them counts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federation import Federation, tiny_run
from questions import answering_run
from runs import write_run
from tiny_causal import causal_checkpoint, instructions

from spry_app.report import render
from spry_app.report.folder import read_run
from spry_app.report.measures import main_quality


def causal_run(folder: Path) -> dict[str, Any]:
    return tiny_run(folder) | {
        "data.task": "causal-lm",
        "model.name": causal_checkpoint(folder / "model"),
        "data.source": instructions(folder / "rows.jsonl", 24),
        "data.num-labels": 0,
    }


@pytest.mark.parametrize(
    ("run_config", "main", "others"),
    [(answering_run, "f1", ["exact"]), (causal_run, "token-accuracy", ["perplexity", "exact-match"])],
)
def test_a_run_is_judged_by_the_main_metric_of_its_task(
    tmp_path: Path, run_config: Callable[[Path], dict[str, Any]], main: str, others: list[str]
) -> None:
    """As a federation writes it down: within "metrics" and "personalised" of a line."""
    Federation(tmp_path, run_config(tmp_path) | {"server.evaluate-every": 1}).start(2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    run = read_run(tmp_path)
    assert main_quality([run]) == main
    measured = [line["metrics"][main] for line in lines if line["metrics"]]
    assert len(measured) >= 2 and [value for _, value in run.curve(main)] == measured
    assert run.last(f"personalised-{main}") == lines[-1]["personalised"][main]
    found = render([tmp_path])
    assert f"{100 * measured[0]:.1f} % → {100 * measured[-1]:.1f} %" in found
    assert all(f"<figcaption>{name.capitalize()}</figcaption>" in found for name in (main, *others))
    assert f"by {main}" in render([tmp_path, tmp_path])


def test_runs_of_several_tasks_are_compared_by_what_most_of_them_have(tmp_path: Path) -> None:
    answers = write_run(tmp_path / "answers")
    lines = [json.loads(line) for line in (answers / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {"main-metric": "f1", "metrics": {"f1": 0.5, "loss": 9.0}} for line in lines]
    (answers / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    classes = write_run(tmp_path / "classes")
    (classes / "metrics.jsonl").write_text(
        (classes / "metrics.jsonl").read_text().replace('"loss"', '"main-metric": "accuracy", "loss"')
    )
    one, other = read_run(answers), read_run(classes)
    assert main_quality([one]) == "f1"
    assert main_quality([one, other]) == main_quality([other, one]) == "accuracy"
    assert one.last("loss") == other.last("loss") != 9.0  # the loss is never a metric of that name
