"""Runs on the mean of all tokens: resumed, rebuilt, exported, gone on from; here, and where there is no copy."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import LocalGrid, make_rows, tiny_run
from flwr.app import Context, RecordDict
from peft import PeftModel
from test_pooled import MEAN, says
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner
from whole_runs import rebuilt_where_resumed

from spry_app.cli import app
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.models import load_model, start_from
from spry_app.models.pooled import is_copy
from spry_app.server.export import export
from spry_app.server.run import run

TEXTS = ["the film was bad", "a plot was very very great"]


@pytest.fixture
def run_config(tmp_path: Path, cache: Path) -> dict[str, Any]:
    keys = {"data.label-names": "sad,happy", "server.evaluate-every": 1, "method": "spry-per-iteration"}
    keys |= {"data.test": str(make_rows(tmp_path / "test.jsonl", 16, offset=500))}
    config = tiny_run(tmp_path) | keys | {"output-dir": str(tmp_path / "outputs")}
    says(config["model.name"], **MEAN)
    return config


@torch.no_grad()
def _said(model: Any, folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


def _plain(base: str | Path, adapter: Path) -> torch.Tensor:
    """What PEFT makes of it, without Spry."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    return _said(PeftModel.from_pretrained(model, str(adapter)), adapter)


def _exported(source: Path, output: Path, model: str = "") -> torch.Tensor:
    export(source, output, "fp32", model)
    return _said(AutoModelForSequenceClassification.from_pretrained(output), output)


def test_a_run_is_resumed_and_rebuilt_to_the_byte(run_config: dict, tmp_path: Path) -> None:
    assert rebuilt_where_resumed(run_config | {"num-server-rounds": 3}, tmp_path, 2).adapted.sees_mean


def test_its_adapter_is_of_use_here_and_elsewhere(
    run_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Context(run_id=7, node_id=0, node_config={}, state=RecordDict(), run_config=run_config)
    run(LocalGrid(2, run_config), context)  # type: ignore[arg-type]
    folder, tiny = tmp_path / "outputs" / "7", run_config["model.name"]
    adapter = folder / "adapter"
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert is_copy(base)
    expected = _plain(base, adapter)
    torch.testing.assert_close(_exported(folder, tmp_path / "full"), expected, rtol=1e-4, atol=1e-5)

    config = RunConfig.from_flower(run_config | {"adapter.path": str(adapter)})
    again = load_model(config.model, config.adapter, 2, config.seed)
    start_from(again, config.adapter)
    tokens = again.tokenizer(TEXTS, padding=True, return_tensors="pt")
    torch.testing.assert_close(again.logits({}, dict(tokens)).detach(), expected, rtol=1e-4, atol=1e-5)

    monkeypatch.chdir(tmp_path)  # as the card says, on any machine
    command = re.search(r"^spry (mean-pool .*)$", (adapter / "README.md").read_text(), re.MULTILINE)
    assert command and CliRunner().invoke(app, shlex.split(command[1])).exit_code == 0
    assert 'from_pretrained("mean-pooled", num_labels=2)' in (adapter / "README.md").read_text()
    torch.testing.assert_close(_plain("mean-pooled", adapter), expected, rtol=0, atol=0)

    shutil.rmtree(base)
    shutil.copytree(adapter, tmp_path / "alone")
    with pytest.raises(SpryError, match=r"not on this machine: .*README\.md .*`spry mean-pool`.*by --model"):
        _exported(tmp_path / "alone", tmp_path / "no")
    shutil.rmtree(Path(tiny, "1_Pooling"))  # a copy of the encoder may lack it, and the adapter is for the mean
    found = [_exported(tmp_path / "alone", tmp_path / f"from-{i}", m) for i, m in enumerate((tiny, "mean-pooled"))]
    found.append(_exported(folder, tmp_path / "made-again"))
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
