"""`spry run` for real: SuperLink, Ray and virtual clients on a tiny model; and what a run leaves in each mode."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from federation import LocalGrid, make_checkpoint, make_rows, same
from flwr.app import Context, RecordDict
from left_running import left_running
from pages import DOCS, write_files
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from spry_app.server.rebuild import rebuild
from spry_app.server.run import run as serve

ROOT = Path(__file__).parent.parent
ROUNDS = 3
NODES = 4
OWN = "my_method:paired"
"""Of docs/extending.md: scalars both ways."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("end-to-end")
    make_checkpoint(folder / "tiny")
    make_rows(folder / "train.jsonl", 96)
    make_rows(folder / "test.jsonl", 40, offset=1000)
    (folder / "own").mkdir()
    write_files(DOCS / "extending.md", folder / "own")
    return folder


def run_config(folder: Path, method: str) -> dict[str, Any]:
    return {
        "method": method,
        "model.name": str(folder / "tiny"),
        "data.source": str(folder / "train.jsonl"),
        "data.test": str(folder / "test.jsonl"),
        "data.partition": "natural",
        "data.natural-field": "user",
        "data.num-labels": 2,
        "client.local-steps": 2,
        "client.directions": 2,
        "num-server-rounds": ROUNDS,
        "server.evaluate-every": 1,
    }


def by_flower(folder: Path, method: str, temporary: Path) -> subprocess.CompletedProcess[str]:
    """`spry run` with `temporary` for its temporary files."""
    keys = " ".join(f"{key}={json.dumps(value)}" for key, value in run_config(folder, method).items())
    command = [sys.executable, "-m", "spry_app.cli", "run", "--nodes", str(NODES), "--run-config", keys]
    return subprocess.run(
        [*command, "--output-dir", str(folder / "flower"), str(ROOT)],
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(folder / "own")},
        capture_output=True,
        text=True,
        timeout=240,
    )


def in_one_process(folder: Path, method: str) -> Path:
    """What the ServerApp does, with the ClientApp called in its own process; returns the folder of the run."""
    config = run_config(folder, method) | {"output-dir": str(folder / method)}
    context = Context(run_id=7, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    serve(LocalGrid(NODES, config), context)  # type: ignore[arg-type]
    return folder / method / "7"


@pytest.fixture(scope="module")
def per_epoch(folder: Path) -> Path:
    return in_one_process(folder, "spry")


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """A directory with a short name: Ray puts sockets below it."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def finished(folder: Path, temporary: Path) -> subprocess.CompletedProcess[str]:
    return by_flower(folder, OWN, temporary)


@pytest.fixture(scope="module")
def per_iteration(folder: Path, finished: subprocess.CompletedProcess[str]) -> Path:
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (run,) = (folder / "flower").iterdir()
    return run


@pytest.fixture(params=["per_epoch", "per_iteration"])
def run(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_completed_run_shows_each_round_and_the_result_and_leaves_nothing_running(
    finished: subprocess.CompletedProcess[str], per_iteration: Path, temporary: Path
) -> None:
    for line in lines(per_iteration)[1:]:
        shown = f"Round {line['round']}/{ROUNDS}  loss {line['loss']:.3f}  accuracy {line['accuracy']:.1%}"
        assert shown in finished.stdout
    result = json.loads((per_iteration / "result.json").read_text())
    assert f"{result['accuracy-before']:.1%} before, {result['accuracy-after']:.1%} after" in finished.stdout
    assert f"{result['peak-mib']:.1f} MiB a client step" in finished.stdout
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", finished.stdout + finished.stderr)  # it may be a log of CI
    assert left_running(temporary) == [] and list(temporary.iterdir()) == []


def test_every_round_leaves_a_line(run: Path) -> None:
    assert [line["round"] for line in lines(run)] == list(range(ROUNDS + 1))
    for before, after in zip(lines(run)[1:], lines(run)[2:], strict=False):
        assert after["mib-up"] > before["mib-up"] > 0
        assert after["mib-down"] > before["mib-down"] > 0
        assert after["seconds"] > before["seconds"]
    for line in lines(run)[1:]:
        assert (line["asked"], line["answered"], line["refused"]) == (NODES, NODES, 0)
        assert 0 <= line["accuracy"] <= 1
        assert 0 <= line["personalised-accuracy"] <= 1
        assert line["peak-mib"] > 0


def test_the_adapter_scores_what_the_log_says(run: Path, folder: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(folder / "tiny", num_labels=2)
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    rows = load_dataset("json", data_files=str(folder / "test.jsonl"), split="train", cache_dir=str(folder / "cache"))
    with torch.no_grad():
        logits = model(**tokenizer(rows["text"][:], padding=True, return_tensors="pt")).logits
    labels = torch.tensor(rows["label"][:])
    last = lines(run)[-1]
    assert (logits.argmax(-1) == labels).float().mean().item() == pytest.approx(last["accuracy"])
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(last["loss"], rel=1e-4)


def test_the_result_names_what_was_left_and_what_it_cost(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert result["accuracy-before"] == lines(run)[0]["accuracy"]
    assert result["accuracy-after"] == lines(run)[-1]["accuracy"]
    assert result["gradient"] == "forward-mode"
    assert result["peak-mib"] > 0 < result["peak-mib-backprop"]
    assert all(Path(result[key]).exists() for key in ("adapter", "metrics", "picture"))
    assert Path(result["picture"]).read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "config.json").read_text())["num-server-rounds"] == ROUNDS


def test_the_report_tells_who_trained_what_and_in_a_simulation_who_held_what(run: Path, per_iteration: Path) -> None:
    about = json.loads((run / "run.json").read_text())
    nodes = {node["node"] for node in about["nodes"]}
    for line in map(json.loads, (run / "assignments.jsonl").read_text().splitlines()):
        assert {node for hand in line["hands"] for node in hand["used"]} == nodes and len(nodes) == NODES
    report = (run / "report.html").read_text()
    assert "Who trained which units when" in report
    simulated = run == per_iteration
    assert ("Rows of each label on each client" in report) is simulated
    assert [sum(node["labels"]) for node in about["nodes"] if simulated] == [
        node["examples"] + node["heldout"] for node in about["nodes"] if simulated
    ]


def test_the_scalars_alone_give_the_adapter(
    per_iteration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What real clients sent through Ray, read in another process."""
    monkeypatch.syspath_prepend(per_iteration.parents[1] / "own")
    rebuild(per_iteration / "slopes.jsonl", tmp_path)
    assert same(*(load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, per_iteration / "adapter")))


def test_the_same_seed_gives_the_same_adapter_with_flower_and_in_one_process(
    folder: Path, per_iteration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other node ids, other processes, another order of replies; a method from outside the package."""
    monkeypatch.syspath_prepend(folder / "own")
    twin = in_one_process(folder, OWN)
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (per_iteration, twin)]
    assert same(*weights)
    assert [line["accuracy"] for line in lines(twin)] == [line["accuracy"] for line in lines(per_iteration)]
