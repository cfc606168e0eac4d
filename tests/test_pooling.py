"""A checkpoint with one more block that averages: against the mean taken by hand, and what it refuses."""

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import inputs_of, load_tiny, write_checkpoint
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline
from typer.testing import CliRunner

from spry_app.cli import app
from spry_app.config import AdapterConfig, ModelConfig
from spry_app.errors import SpryError
from spry_app.models import load_model
from spry_app.models.pooling import SHARE, SLOPE, write_mean_pooled

SENTENCES = ["w5 w9 w11 w2 w20 w3", "w7 w8", "w4"]
HEADS = {"bert": "modules_to_save.default", "roberta": "modules_to_save.default.out_proj"}
"""Family -> end of the name of the map from features to classes, in a model that is to be trained."""


def by_hand(source: str) -> tuple[dict[str, Tensor], Tensor]:
    """A batch with padding, and what the classifier is to see of it."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        states = AutoModel.from_pretrained(source).eval()(**batch).last_hidden_state
    kept = batch["attention_mask"].unsqueeze(-1)
    mean = (states * kept).sum(1) / kept.sum(1)
    return batch, torch.tanh(SLOPE * layer_norm(mean, mean.shape[-1:]))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_classifier_sees_the_mean_of_all_tokens_but_padding(family: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "plain", family)
    write_mean_pooled(source, tmp_path / "pooled")
    batch, expected = by_hand(source)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pooled").eval()
    head = model.classifier if family == "bert" else model.classifier.out_proj
    seen: list[Tensor] = []
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(**batch)
    torch.testing.assert_close(seen[0], expected, atol=10 / SHARE * SLOPE, rtol=0.0)
    far = torch.tanh(SLOPE * layer_norm(_first(source, batch), expected.shape[-1:]))
    assert (far - expected).abs().max() > 0.05  # the first token is something else


def _first(source: str, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        states: Tensor = AutoModel.from_pretrained(source).eval()(**batch).last_hidden_state
    return states[:, 0]


def test_the_classifier_is_left_to_the_run_and_every_box_draws_the_same(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "plain", "bert")
    for name in ("here", "there"):
        torch.seed()
        write_mean_pooled(source, tmp_path / name)
    here, there = (
        load_model(ModelConfig(name=str(tmp_path / name), device="cpu"), AdapterConfig(rank=2), 3, seed=5)
        for name in ("here", "there")
    )
    assert here.fingerprint == there.fingerprint
    assert len(here.blocks) == 3 and not [unit for unit in here.units if "layer.2." in unit]


def test_it_is_a_plain_checkpoint_to_a_pipeline(tmp_path: Path) -> None:
    write_mean_pooled(write_checkpoint(tmp_path / "plain", "roberta"), tmp_path / "pooled")
    told = pipeline("text-classification", str(tmp_path / "pooled"), device="cpu")(SENTENCES)
    assert [set(one) for one in told] == [{"label", "score"}] * 3


@pytest.mark.parametrize(("quantization", "least"), [("nf4", 0.9), ("int8", 0.99)])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_quantised_it_says_nearly_the_same(family: str, quantization: str, least: float, tmp_path: Path) -> None:
    """The block that averages is zeros and multiples of the identity, which both formats hold to the bit."""
    write_mean_pooled(write_checkpoint(tmp_path / "plain", family), tmp_path / "pooled")
    seen: list[Tensor] = []
    for kind in ("none", quantization):
        adapted = load_tiny(str(tmp_path / "pooled"), model={"quantization": kind}, kind="none")
        (head,) = (part for name, part in adapted.model.named_modules() if name.endswith(HEADS[family]))
        head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        adapted.logits({}, inputs_of(adapted))
    full, quantised = seen
    assert not torch.equal(full, quantised)
    assert cosine_similarity(full, quantised).min() > least


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_other_families_are_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(SpryError, match="bert, roberta, xlm-roberta"):
        write_mean_pooled(write_checkpoint(tmp_path / "plain", family), tmp_path / "pooled")
    assert not (tmp_path / "pooled").exists()


def test_the_command_says_how_to_go_on_and_never_overwrites(tmp_path: Path) -> None:
    source, folder = write_checkpoint(tmp_path / "plain"), tmp_path / "pooled"
    done = CliRunner().invoke(app, ["mean-pool", source, str(folder)])
    assert (done.exit_code, f'model.name="{folder}"' in done.output) == (0, True), done.output
    again = CliRunner().invoke(app, ["mean-pool", source, str(folder)])
    assert again.exit_code == 2 and "not empty" in again.output
    absent = CliRunner().invoke(app, ["mean-pool", str(tmp_path / "none"), str(tmp_path / "x")])
    assert absent.exit_code == 2 and "model.name is" in absent.output and "Allowed are a Hub name" in absent.output
