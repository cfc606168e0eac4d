"""model.pooling: when a run's classifier sees the mean of all tokens, the copy that a machine makes for it, and that
nobody trains the block which takes the mean.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from federation import same
from peft import PeftModel
from processes import at_once
from test_pooling import by_hand
from tiny_checkpoints import MAPS, inputs_of, load_tiny, shaken, write_checkpoint
from tiny_models import slopes_by_backprop, some_directions
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from spry_app.autodiff.slopes import Part, forward_mode
from spry_app.config import AdapterConfig, ModelConfig
from spry_app.errors import SpryError
from spry_app.models import AdaptedModel, load_model, pooled, save_adapter
from spry_app.models.adapter import KINDS
from spry_app.models.pooled import is_copy
from spry_app.models.skeleton import skeleton
from spry_app.stored import cache_folder
from spry_app.tasks import TASKS

MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
BLOCK = ".layer.2."
"""The block that takes the mean in a tiny model of two."""


def says(folder: str | Path, **pooling: Any) -> str:
    """The checkpoint, as a sentence encoder's that makes this of its tokens."""
    Path(folder, "1_Pooling").mkdir(exist_ok=True)
    Path(folder, "1_Pooling", "config.json").write_text(json.dumps({"word_embedding_dimension": 32} | pooling))
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return says(write_checkpoint(tmp_path_factory.mktemp("encoder")), **MEAN)


def blocks(folder: str, task: str = "classification", **model: Any) -> int:
    config = ModelConfig.model_validate({"name": folder, "device": "cpu", **model})
    classes = 3 if task != "question-answering" else 0
    return len(load_model(config, AdapterConfig(rank=2), classes, 0, task=TASKS[task]).blocks)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_what_the_classifier_sees_of_a_sentence_encoder_is_the_mean_of_its_tokens(family: str, tmp_path: Path) -> None:
    source = says(write_checkpoint(tmp_path, family), **MEAN)
    adapted = load_tiny(source, kind="none")
    batch, expected = by_hand(source)
    head: Any = adapted.model.get_base_model().classifier.modules_to_save["default"]
    seen: list[Tensor] = []
    (head if family == "bert" else head.out_proj).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        adapted.logits({}, batch)
    torch.testing.assert_close(seen[0], expected, atol=2e-3, rtol=0.0)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_mean_stays_one_in_few_bits(encoder: str, quantization: str) -> None:
    """Multiples of the identity, and zeros, are exact in both: every place holds the same, whatever stood there."""
    adapted = load_tiny(encoder, model={"quantization": quantization})
    inner, inputs = adapted.model.get_base_model(), inputs_of(adapted)
    with torch.no_grad():
        hidden: Tensor = inner.base_model(**inputs).last_hidden_state  # type: ignore[operator]
    assert adapted.sees_mean and hidden.isfinite().all()
    for row, kept in zip(hidden.float(), inputs["attention_mask"].bool(), strict=True):
        torch.testing.assert_close(row[kept], row[:1].expand(int(kept.sum()), -1), rtol=0, atol=0.05)
    assert (hidden[0, 0] - hidden[1, 0]).abs().max() > 0.2


@pytest.mark.parametrize(
    ("said", "mean"),
    [
        (MEAN, True),
        ({"embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": True}, True),
        ({"pooling_mode": ["mean"]}, True),
        ({"pooling_mode": "cls"}, False),
        (MEAN | {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, False),
        (MEAN | {"pooling_mode_max_tokens": True}, False),
        ({}, False),
    ],
)
def test_auto_is_the_mean_where_the_checkpoint_says_so(said: dict[str, Any], mean: bool, tmp_path: Path) -> None:
    assert blocks(says(write_checkpoint(tmp_path), **said)) == 2 + mean


def test_auto_is_the_first_token_where_the_mean_cannot_be_taken_and_mean_is_refused(
    encoder: str, tmp_path: Path
) -> None:
    assert blocks(encoder, "multiple-answers") == 3
    assert blocks(encoder, pooling="first") == blocks(encoder, "question-answering") == 2
    with pytest.raises(SpryError, match=r'model\.pooling is "mean".*family \'bert\', and the task is for question-'):
        blocks(encoder, "question-answering", pooling="mean")
    other = says(write_checkpoint(tmp_path / "other", "distilbert"), **MEAN)
    assert blocks(other) == 2
    with pytest.raises(SpryError, match=r"for classifiers of the families bert, roberta, xlm-roberta: .*distilbert"):
        blocks(other, pooling="mean")
    plain = write_checkpoint(tmp_path / "plain")
    assert (blocks(plain), blocks(plain, pooling="mean")) == (2, 3)


def test_a_copy_is_made_once_and_again_where_the_checkpoint_is_another(tmp_path: Path, cache: Path) -> None:
    source, models = says(write_checkpoint(tmp_path / "source"), **MEAN), cache.parent / "models"
    load_tiny(source)
    (copy,) = models.glob("source-mean-*[!k]")
    made = (copy / "config.json").stat().st_mtime_ns
    load_tiny(source)
    assert is_copy(str(copy)) and not is_copy(source)
    assert (copy / "config.json").stat().st_mtime_ns == made and (models.stat().st_mode & 0o777) == 0o700
    load_tiny(str(copy), model={"pooling": "mean"})  # sees the mean already
    assert len(list(models.glob("*-mean-*[!k]"))) == 1 and not list(models.glob("new-*"))
    write_checkpoint(tmp_path / "source", seed=1)
    assert load_tiny(source).fingerprint != load_tiny(str(copy)).fingerprint
    assert len(list(models.glob("*-mean-*[!k]"))) == 2


def test_who_makes_the_copy_draws_what_all_others_do(tmp_path: Path, cache: Path) -> None:
    source = says(write_checkpoint(tmp_path / "source"), **MEAN)
    first, second = load_tiny(source, rank=2), load_tiny(source, rank=2)
    assert first.fingerprint == second.fingerprint and same(first.tensors(), second.tensors())


_LOAD = """
import sys; sys.path.insert(0, "tests")
from tiny_checkpoints import load_tiny

sys.stdin.readline()
adapted = load_tiny(sys.argv[1])
print(len(adapted.blocks), adapted.model.peft_config["default"].base_model_name_or_path)
"""


@pytest.mark.slow
def test_processes_that_start_at_once_make_one_copy(tmp_path: Path, cache: Path) -> None:
    source = says(write_checkpoint(tmp_path / "source"), **MEAN)
    command = [sys.executable, "-c", _LOAD, source]
    said = set(at_once(command))
    (copy,) = (cache.parent / "models").glob("source-mean-*[!k]")
    assert said == {f"3 {copy}\n"}


def test_a_copy_that_would_not_fit_while_it_is_made_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = says(write_checkpoint(tmp_path / "source"), **MEAN)
    monkeypatch.setattr(pooled, "free_bytes", lambda device: 1000)
    with pytest.raises(SpryError, match=r"0\.00 GiB are free: .*`spry mean-pool`.*model\.pooling to \"first\""):
        load_tiny(source)
    assert not list((cache.parent / "models").glob("*-mean-*[!k]"))


def test_of_the_hub_what_its_cache_has_is_enough(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tests are offline. Another commit is another copy; a file of which the cache knows nothing is told of, and one
    that the Hub is known not to have is not.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--encoder"
    for commit, seed in (("a" * 40, 0), ("b" * 40, 1)):
        says(write_checkpoint(repository / "snapshots" / commit, seed=seed), **MEAN)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    found = load_tiny("owner/encoder")
    assert is_copy(names_of(found)) and "/encoder-mean-" in names_of(found)
    assert found.model.peft_config["default"].revision is None
    other = load_tiny("owner/encoder", model={"revision": "b" * 40})
    assert names_of(other) != names_of(found) and other.fingerprint != found.fingerprint
    (repository / "snapshots" / ("a" * 40) / "1_Pooling" / "config.json").unlink()
    caplog.clear()
    assert names_of(load_tiny("owner/encoder")) == "owner/encoder"
    assert [record.getMessage() for record in caplog.records if "owner/encoder" in record.getMessage()] == [
        "The Hub is not asked, and this machine's cache does not tell whether owner/encoder is to see the mean of all "
        'tokens (1_Pooling/config.json): it sees the first. Set model.pooling to "mean" or "first".'
    ]
    absent = repository / ".no_exist" / ("a" * 40) / "1_Pooling" / "config.json"
    absent.parent.mkdir(parents=True)
    absent.touch()
    caplog.clear()
    assert names_of(load_tiny("owner/encoder")) == "owner/encoder"
    assert "owner/encoder" not in caplog.text


ADAPTERS: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in KINDS if kind != "prefix"} | {
    "all-linear": {"targets": "all-linear"},
    "named": {"targets": "query,dense"},
    "biases": {"bias": "all"},
    "dora": {"dora": True},
    "ranks": {"rank_pattern": "query:3"},
    **MAPS,
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's own, of a normalisation
@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_no_adapter_is_in_the_block_that_takes_the_mean(kind: str, family: str, tmp_path: Path) -> None:
    """Its units are those of the model as it is; plain PEFT loads what is saved, on the copy, with the same answers."""
    source = says(write_checkpoint(tmp_path / "source", family), **MEAN)
    adapted = load_tiny(source, **ADAPTERS[kind])
    plain = load_tiny(source, model={"pooling": "first"}, **ADAPTERS[kind])
    assert adapted.sees_mean and not plain.sees_mean
    assert {unit: names for unit, names in adapted.units.items() if unit != "coordinates"} == plain.units
    assert not [name for names in adapted.units.values() for name in names if BLOCK in name]
    adapters = [name for name, _ in adapted.model.named_modules() if name.endswith("base_layer")]
    assert not [name for name in adapters if BLOCK in name]
    assert {name: depth for name, depth in adapted.depths().items() if depth < 2} == {
        name: depth for name, depth in plain.depths().items() if depth < 2
    }
    tensors = shaken(adapted.tensors(), 0.1)
    save_adapter(adapted, tensors, tmp_path / "saved")
    if kind == "p-tuning":  # what its network has made is saved, rounded otherwise
        return
    name = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=3)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "saved")).eval()
    inputs = inputs_of(adapted)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, adapted.logits(tensors, inputs), rtol=1e-4, atol=1e-4)


def test_keys_and_values_of_virtual_tokens_are_refused(encoder: str) -> None:
    with pytest.raises(SpryError, match=r'"prefix", to which every block attends.*model\.pooling to "first"'):
        load_tiny(encoder, kind="prefix", virtual_tokens=3)
    assert load_tiny(encoder, model={"pooling": "first"}, kind="prefix", virtual_tokens=3).units


@pytest.mark.parametrize("targets", ["", "1.attention.self.query", "all-linear"])
def test_slopes_below_the_block_are_those_of_backprop_wherever_a_pass_begins(encoder: str, targets: str) -> None:
    adapted = load_tiny(encoder, rank=2, targets=targets)
    inputs, labels = inputs_of(adapted), torch.tensor([0, 2])
    tensors = shaken(adapted.tensors(), 0.2)
    names = [name for unit, names in adapted.units.items() if unit != "head" for name in names]
    lowest = adapted.depth(names)
    assert lowest == (1 if targets.startswith("1.") else 0)

    def loss(params: dict[str, Tensor], depth: int = 0) -> Tensor:
        entering = adapted.prefix(inputs, depth, tensors) if depth else None
        return F.cross_entropy(adapted.logits({**tensors, **params}, inputs, entering=entering), labels)

    own = {name: tensors[name] for name in names}
    directions = some_directions(own, 3)
    expected = slopes_by_backprop(loss, own, directions)
    assert torch.tensor(expected).abs().max() > 1e-3
    for depth in {0, lowest}:
        _, found = forward_mode([Part(partial(loss, depth=depth), 1.0)], own, directions)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-6)
    with torch.no_grad():  # the head's own pass begins above all three blocks
        torch.testing.assert_close(loss({}, 3), loss({}), rtol=1e-5, atol=1e-6)


def test_a_plan_sees_the_block_without_writing_it(encoder: str, cache: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(encoder)
    config = ModelConfig(name=encoder, device="cpu")
    planned = skeleton(config, AdapterConfig(rank=2), TASKS["classification"], 3, tokenizer)
    assert not (cache.parent / "models").exists()
    real = load_tiny(encoder, rank=2)
    assert planned.sees_mean and (planned.blocks, planned.units) == (real.blocks, real.units)
    few = skeleton(config, AdapterConfig(rank=2), TASKS["classification"], 3, tokenizer, layers=1)
    assert len(few.blocks) == 1 and few.units


def names_of(adapted: AdaptedModel) -> str:
    return str(adapted.model.peft_config["default"].base_model_name_or_path)


def test_the_base_of_an_adapter_is_the_copy_and_without_one_what_it_was(encoder: str) -> None:
    copy = names_of(load_tiny(encoder))
    assert is_copy(copy) and Path(copy).parent == cache_folder("models")
    assert names_of(load_tiny(encoder, model={"pooling": "first"})) == encoder
