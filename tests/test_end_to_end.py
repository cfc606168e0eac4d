"""`spry run` for real: SuperLink, Ray and virtual clients on a tiny model; and what a run leaves behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from federation import make_checkpoint, make_rows
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).parent.parent
ROUNDS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("end-to-end")
    make_checkpoint(folder / "tiny")
    make_rows(folder / "train.jsonl", 96)
    make_rows(folder / "test.jsonl", 40, offset=1000)
    (folder / "own").mkdir()
    (folder / "own" / "my_method.py").write_text(readme_method())
    return folder


def readme_method() -> str:
    """The README's example of a method of one's own: at most 40 lines, in a file outside the package."""
    (code,) = re.findall(r"```python\n(# my_method\.py.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 40
    return code


def spry_run(folder: Path, output: str, method: str) -> Path:
    """Run the app; returns the folder of the run."""
    keys = {
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
    run_config = " ".join(f"{key}={json.dumps(value)}" for key, value in keys.items())
    command = [sys.executable, "-m", "spry_app.cli", "run", "--nodes", "4", "--run-config", run_config]
    done = subprocess.run(
        [*command, "--output-dir", str(folder / output), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(folder / "own")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (folder / output).iterdir()
    return run


@pytest.fixture(scope="module")
def per_epoch(folder: Path) -> Path:
    return spry_run(folder, "per-epoch", "my_method:paired")


@pytest.fixture(scope="module")
def per_iteration(folder: Path) -> Path:
    return spry_run(folder, "per-iteration", "spry-per-iteration")


@pytest.fixture(params=["per_epoch", "per_iteration"])
def run(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_round_leaves_a_line(run: Path) -> None:
    assert [line["round"] for line in lines(run)] == list(range(ROUNDS + 1))
    for before, after in zip(lines(run)[1:], lines(run)[2:], strict=False):
        assert after["mib-up"] > before["mib-up"] > 0
        assert after["mib-down"] > before["mib-down"] > 0
        assert after["seconds"] > before["seconds"]
    for line in lines(run)[1:]:
        assert (line["asked"], line["answered"], line["refused"]) == (4, 4, 0)
        assert 0 <= line["accuracy"] <= 1
        assert 0 <= line["personalised-accuracy"] <= 1
        assert line["peak-mib"] > 0


def test_what_the_user_wrote_is_what_ran(per_epoch: Path) -> None:
    assert json.loads((per_epoch / "config.json").read_text())["method"] == "my_method:paired"


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
    assert result["peak-mib"] > 0 < result["peak-mib-backprop"]
    assert all(Path(result[key]).exists() for key in ("adapter", "metrics", "picture"))
    assert Path(result["picture"]).read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "config.json").read_text())["num-server-rounds"] == ROUNDS


def test_the_scalars_alone_give_the_adapter(per_iteration: Path, tmp_path: Path) -> None:
    """Rebuilt in another process than the server's, from what real clients sent through Ray."""
    command = [sys.executable, "-m", "spry_app.cli", "rebuild", str(per_iteration / "slopes.jsonl")]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rebuilt, kept = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, per_iteration / "adapter")
    )
    assert rebuilt.keys() == kept.keys()
    assert all(torch.equal(rebuilt[name], kept[name]) for name in kept)


def test_the_same_seed_gives_the_same_adapter(folder: Path, per_epoch: Path) -> None:
    twin = spry_run(folder, "twin", "my_method:paired")
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (per_epoch, twin)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
