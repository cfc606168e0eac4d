"""A run's adapter and its merge: the run's last evaluation again, by PEFT and by transformers alone; and the card."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from federation import make_checkpoint, make_rows
from federation import make_checkpoint as tiny_checkpoint
from flwr.app import Context, RecordDict
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from typer.testing import CliRunner

from benchmarks.local_grid import LocalGrid
from spry_app.cli import app
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import get_method
from spry_app.server import run as run_room
from spry_app.server.card import card
from spry_app.server.export import export
from spry_app.server.record import Round
from spry_app.server.run import run

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "core": {"subspace": "core", "rank": 3},
    "dora": {"dora": True},
    "vera": {"kind": "vera", "rank": 4},
    "ia3": {"kind": "ia3"},
    "bitfit": {"kind": "bitfit"},
    "layernorm": {"kind": "layernorm"},
    "none": {"kind": "none"},
}
NAMES = ["sad", "happy"]


def _run(folder: Path, method: str = "fedavg", **adapter: Any) -> Path:
    """A run of two rounds that learns something; its folder."""
    config: dict[str, Any] = {
        "method": method,
        "model.name": str(make_checkpoint(folder / "tiny")),
        "data.source": str(make_rows(folder / "rows.jsonl", 48)),
        "data.test": str(make_rows(folder / "test.jsonl", 24, offset=500)),
        "data.label-names": ",".join(NAMES),
        "data.partition": "iid",
        "client.local-steps": 4,
        "client.learning-rate": 0.3,
        "num-server-rounds": 2,
        "output-dir": str(folder / "outputs"),
    }
    config |= {f"adapter.{key.replace('_', '-')}": value for key, value in adapter.items()}
    context = Context(run_id=7, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    run(LocalGrid(2, config), context)  # type: ignore[arg-type]
    return folder / "outputs" / "7"


def _rows(folder: Path) -> tuple[list[str], torch.Tensor]:
    rows = [json.loads(line) for line in (folder.parent.parent / "test.jsonl").read_text().splitlines()]
    return [row["text"] for row in rows], torch.tensor([row["label"] for row in rows])


@torch.no_grad()
def _logits(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    return model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits.float()


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's own, of a normalisation
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_and_its_merge_give_the_last_evaluation_of_the_run(tmp_path: Path, kind: str) -> None:
    folder = _run(tmp_path, **KINDS[kind])
    first, *_, last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert last["loss"] < first["loss"] - 0.01
    texts, labels = _rows(folder)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tiny", num_labels=2)
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    logits = _logits(adapted, tokenizer, texts)
    assert cross_entropy(logits, labels).item() == pytest.approx(last["loss"], abs=1e-5)

    export(folder, tmp_path / "full", "fp32")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "full")
    torch.testing.assert_close(_logits(merged, tokenizer, texts), logits, rtol=1e-4, atol=1e-5)
    export(folder / "adapter", tmp_path / "half", "bf16")
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(_logits(half, tokenizer, texts), logits, rtol=0.05, atol=0.05)

    answers = pipeline("text-classification", str(tmp_path / "full"))(texts)
    assert [answer["label"] for answer in answers] == [NAMES[i] for i in logits.argmax(-1)]
    assert sum(a["label"] == NAMES[i] for a, i in zip(answers, labels, strict=True)) == last["accuracy"] * len(labels)


def test_weights_that_the_checkpoint_lacks_are_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pooler that is drawn at random is in no adapter."""

    def without_pooler(folder: Path) -> Path:
        file = tiny_checkpoint(folder) / "model.safetensors"
        kept = {name: value for name, value in load_file(file).items() if "pooler" not in name}
        save_file(kept, file, metadata={"format": "pt"})
        return folder

    monkeypatch.setitem(globals(), "make_checkpoint", without_pooler)
    folder = _run(tmp_path, rank=2)
    export(folder, tmp_path / "full", "fp32")
    texts, labels = _rows(folder)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "full")
    logits = _logits(merged, AutoTokenizer.from_pretrained(tmp_path / "full"), texts)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert cross_entropy(logits, labels).item() == pytest.approx(last["loss"], abs=1e-5)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(tmp_path_factory.mktemp("run"), rank=2)


def test_the_command_writes_a_model_or_says_why_not(tmp_path: Path, done: Path) -> None:
    output, call = tmp_path / "model", CliRunner().invoke
    first = call(app, ["export", str(done), str(output), "--dtype", "fp32"])
    assert first.exit_code == 0 and not first.stderr and len(first.stdout.splitlines()) == 1  # no library's bars
    before = sorted(path.name for path in output.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(before)
    again = call(app, ["export", str(done), str(output)])
    assert again.exit_code == 2 and "is not empty" in again.stderr
    (output / "mine.txt").write_text("kept?")
    assert call(app, ["export", str(done), str(output), "--force"]).exit_code == 0
    assert sorted(path.name for path in output.iterdir()) == before
    assert call(app, ["export", str(done), str(tmp_path / "x"), "--dtype", "int3"]).exit_code == 2
    assert not list(tmp_path.glob("*.new")) and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter"),
        (lambda folder: (folder / "labels.json").unlink(), r"has no labels\.json: write the names of the classes"),
        (lambda folder: (folder / "labels.json").write_text("["), "cannot be read"),
    ],
)
def test_what_is_no_adapter_is_refused(tmp_path: Path, done: Path, change: Any, sentence: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (done / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    with pytest.raises(SpryError, match=sentence):
        export(folder, tmp_path / "out")


def test_a_folder_that_holds_the_run_is_never_replaced(done: Path) -> None:
    with pytest.raises(SpryError, match=r"holds .* itself"):
        export(done, done.parent, force=True)
    assert (done / "adapter").is_dir()


def test_virtual_tokens_cannot_be_merged(tmp_path: Path) -> None:
    folder = _run(tmp_path, kind="prompt", virtual_tokens=3)
    with pytest.raises(SpryError, match=r"holds virtual tokens .* load the folder with PEFT"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_beside_an_adapter_is_what_the_run_was_and_its_lines_load_it(done: Path) -> None:
    text = (done / "adapter" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    result = json.loads((done / "result.json").read_text())
    assert data["library_name"] == "peft" and data["metrics"] == ["accuracy"] and "lora" in data["tags"]
    assert "base_model" not in data  # a path on this machine is nobody else's
    found = data["model-index"][0]["results"][0]["metrics"][0]
    assert found == {"type": "accuracy", "value": round(result["accuracy-after"], 4)}
    assert f"| after round 2 | {result['accuracy-after']:.4f} |" in body
    assert "`sad`, `happy`" in body and get_method(RunConfig.from_flower({"method": "fedavg"})).paper in body
    assert f"peft {__import__('peft').__version__}" in body
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code.replace("<this folder>", str(done / "adapter")), scope)
    assert scope["model"].peft_config["default"].r == 2


def test_the_card_of_a_merge_loads_by_a_pipeline(tmp_path: Path, done: Path) -> None:
    export(done, tmp_path / "out", "fp32")
    _, front, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "PeftModel" not in body and "## Costs" in body
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    exec(code.replace("<this folder>", str(tmp_path / "out")))


def test_a_card_names_the_hub_model_the_costs_and_what_was_promised() -> None:
    config = RunConfig.from_flower({"model.quantization": "nf4", "model.revision": "abc", "adapter.rank": 4})
    rounds = [
        Round(0, 2, loss=1.0, accuracy=0.25),
        Round(2, 2, loss=0.5, accuracy=0.75, mib_up=1.5, mib_down=2.25, forwards=1234.0, seconds=60.0, epsilon=3.5),
    ]
    text = card(config, get_method(config), rounds, ["a", "b"], "owner/name", {"torch": "1"})
    data = yaml.safe_load(text.split("---\n")[1])
    assert data["base_model"] == "owner/name" and data["pipeline_tag"] == "text-classification"
    for said in (
        "at `abc`",
        "in nf4",
        "2.25 MiB",
        "1.50 MiB",
        "1234 forward passes",
        "epsilon 3.5",
        "`adapter.rank=4`",
    ):
        assert said in text
    assert "| before training | 0.2500 | 1.0000 |" in text and "| after round 2 | 0.7500 | 0.5000 |" in text
    assert "It was not evaluated" in card(config, get_method(config), [Round(1, 2)], ["a"], "owner/name", {})


@pytest.mark.parametrize("kind", ["lora", "core", "bitfit", "layernorm"])
def test_the_adapter_is_there_after_every_round_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The end writes with PEFT what the last round had, and nothing else."""
    seen: list[tuple[set[str], dict[str, torch.Tensor]]] = []
    write = run_room.write_adapter

    def watched(folder: Path, *args: Any) -> None:
        write(folder, *args)
        weights = load_file(folder / "adapter_model.safetensors")
        seen.append(({path.name for path in folder.iterdir()}, weights))

    monkeypatch.setattr(run_room, "write_adapter", watched)
    folder = _run(tmp_path, **KINDS[kind])
    needed = {"adapter_config.json", "adapter_model.safetensors", "README.md", "labels.json", "tokenizer.json"}
    assert all(needed <= names for names, _ in seen) and not (folder / "adapter.new").exists()
    (_, first), (_, last), (_, end) = seen
    assert end.keys() == last.keys() and all(torch.equal(end[name], last[name]) for name in end)
    assert any(not torch.equal(first[name], last[name]) for name in last)
