"""Every adapter.kind: its units and their depth, its start, its slopes, a federation that learns, a file PEFT loads."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from federation import Federation, tiny_run
from peft import PeftModel
from tiny_checkpoints import inputs_of, load_tiny, shaken, write_checkpoint
from tiny_models import slopes_by_backprop, some_directions
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from spry_app.autodiff.self_check import self_test, shared_pass_test
from spry_app.autodiff.slopes import Part, forward_mode
from spry_app.config import ADAPTER_KEYS, AdapterConfig, ModelConfig
from spry_app.errors import SpryError
from spry_app.models import load_model, save_adapter
from spry_app.models.adapter import KINDS
from spry_app.models.quantized import pass_tangents
from spry_app.models.units import depths

NEW = ["vera", "ia3", "bitfit", "layernorm"]  # tests of models and quantised layers have the others
QV = ("query", "value")
BERT = "base_model.model.bert."


def test_every_kind_has_its_row_in_both_tables() -> None:
    assert list(KINDS) == list(ADAPTER_KEYS)


def test_ia3_has_a_unit_a_matrix_and_bitfit_one_a_block(checkpoint: str) -> None:
    ia3, bitfit = load_tiny(checkpoint, kind="ia3"), load_tiny(checkpoint, kind="bitfit")
    matrices = ["attention.self.key", "attention.self.value", "attention.output.dense", "output.dense"]
    assert list(ia3.units) == [f"encoder.layer.{i}.{name}" for i in range(2) for name in matrices] + ["head"]
    assert ia3.units["encoder.layer.1.output.dense"] == (f"{BERT}encoder.layer.1.output.dense.ia3_l.default",)
    assert [unit for unit in bitfit.units if "layer" in unit] == [f"encoder.layer.{i}.biases" for i in range(2)]
    first = f"{BERT}encoder.layer.0."
    every = {name for name, _ in bitfit.model.named_parameters() if name.startswith(first) and name.endswith("bias")}
    assert set(bitfit.units["encoder.layer.0.biases"]) == every
    assert len(every) == 8  # query, key, value, three other matrices, two norms


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("family", ["bert", "roberta", "opt", "gpt2"])
def test_units_rise_from_block_0_to_the_head(tmp_path: Path, family: str, kind: str) -> None:
    adapted = load_tiny(write_checkpoint(tmp_path, family), kind=kind)
    found, blocks = depths(adapted.units)
    assert blocks == len(adapted.blocks) == 2
    inside = {unit: depth for unit, depth in found.items() if any(part.isdigit() for part in unit.split("."))}
    assert list(inside.values()) == sorted(inside.values()) and set(inside.values()) == {0, 1}
    assert all(adapted.depth(adapted.units[unit]) == depth for unit, depth in inside.items())
    assert found["head"] == 2 == adapted.depth(adapted.units["head"])


def test_vera_has_a_unit_a_matrix_and_layernorm_one_a_norm(checkpoint: str) -> None:
    """What is random in VeRA is no unit's; the norm above the embeddings is the lowest unit."""
    vera, norms = load_tiny(checkpoint, kind="vera", rank=4), load_tiny(checkpoint, kind="layernorm")
    assert list(vera.units) == [*(f"encoder.layer.{i}.attention.self.{n}" for i in range(2) for n in QV), "head"]
    first = f"{BERT}encoder.layer.0.attention.self.query.vera_lambda_"
    assert set(vera.units["encoder.layer.0.attention.self.query"]) == {f"{first}b.default", f"{first}d.default"}
    assert vera.tensors()[f"{first}d.default"].shape == (4,)
    layers = [f"encoder.layer.{i}.{name}.LayerNorm" for i in range(2) for name in ("attention.output", "output")]
    assert list(norms.units) == ["embeddings.LayerNorm", *layers, "head"]
    assert [norms.depth(norms.units[unit]) for unit in norms.units] == [0, 0, 0, 1, 1, 2]


def test_ia3_takes_targets_and_scales_what_enters_a_feed_forward_matrix(checkpoint: str) -> None:
    adapted = load_tiny(checkpoint, kind="ia3", targets="query, output.dense, intermediate.dense")
    shapes = {name.removeprefix(BERT): tuple(tensor.shape) for name, tensor in adapted.tensors().items()}
    width = adapted.model.config.hidden_size
    inner = adapted.model.config.intermediate_size
    assert shapes["encoder.layer.0.attention.self.query.ia3_l.default"] == (width, 1)
    assert shapes["encoder.layer.0.intermediate.dense.ia3_l.default"] == (inner, 1)
    assert shapes["encoder.layer.0.output.dense.ia3_l.default"] == (1, inner)
    assert not any("key" in name for name in shapes)


def test_what_a_model_does_not_have_is_refused_in_a_sentence(tmp_path: Path, checkpoint: str) -> None:
    with pytest.raises(SpryError, match=r"adapter\.kind is 'bitfit'.*this llama model has none: set adapter\.kind"):
        load_tiny(write_checkpoint(tmp_path / "llama", "llama"), kind="bitfit")
    with pytest.raises(SpryError, match=r"adapter\.targets is empty, and the matrices that IA3 scales.*k_lin, lin1"):
        load_tiny(write_checkpoint(tmp_path / "distilbert", "distilbert"), kind="ia3")
    with pytest.raises(SpryError, match=r"adapter\.targets names q_proj, not in this bert model"):
        load_tiny(checkpoint, kind="ia3", targets="q_proj")


@pytest.mark.parametrize("kind", KINDS)
def test_every_node_starts_from_the_same_head_and_adapter(tmp_path: Path, kind: str) -> None:
    """The seed alone draws them, whatever the process drew before: published BitFit clients had a head each."""
    folder = write_checkpoint(tmp_path)
    starts = []
    for before, labels in ((1, 0), (2, 0), (3, 1)):
        torch.manual_seed(before)
        starts.append(load_model(ModelConfig(name=folder), AdapterConfig.model_validate({"kind": kind}), 7, labels))
    one, again, other = (adapted.tensors() for adapted in starts)
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    weight = next(name for name in starts[0].units["head"] if name.endswith("weight"))
    assert one[weight].any() and not torch.equal(one[weight], other[weight])


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("kind", NEW)
def test_slopes_are_backprops_and_pass_the_self_test(checkpoint: str, kind: str, quantization: str) -> None:
    adapted = load_tiny(checkpoint, model={"quantization": quantization}, kind=kind)
    inputs, labels = inputs_of(adapted), torch.tensor([0, 2])

    def loss(params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(adapted.logits(params, inputs), labels)

    self_test(loss, adapted.tensors(), adapted.model)
    shared_pass_test(loss, adapted.tensors(), adapted.model)
    own = {name: tensor for name, tensor in shaken(adapted.tensors()).items() if name not in adapted.units["head"]}
    directions = some_directions(own, 3)
    truth = slopes_by_backprop(loss, own, directions)
    for at_once in (1, 3):
        assert forward_mode([Part(loss, 1.0)], own, directions, at_once)[1] == pytest.approx(truth, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("kind", NEW)
def test_a_half_precision_model_takes_the_kind_as_well(checkpoint: str, kind: str, quantization: str) -> None:
    half = load_tiny(checkpoint, model={"quantization": quantization, "dtype": "bfloat16"}, kind=kind)
    full = load_tiny(checkpoint, model={"quantization": quantization}, kind=kind)
    trained = shaken(full.tensors())
    torch.testing.assert_close(
        half.logits(trained, inputs_of(half)), full.logits(trained, inputs_of(full)), rtol=0.1, atol=0.1
    )


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's own, of a normalisation
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", NEW)
def test_saved_adapter_gives_the_same_logits_when_peft_loads_it(
    tmp_path: Path, checkpoint: str, kind: str, quantization: str
) -> None:
    adapted = load_tiny(checkpoint, model={"quantization": quantization}, kind=kind)
    trained = shaken(adapted.tensors())
    save_adapter(adapted, trained, tmp_path)
    stock = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["classifier"]}
    quantised = {"quantization_config": BitsAndBytesConfig(**stock)} if quantization == "nf4" else {}
    fresh = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3, **quantised)
    pass_tangents(fresh)  # the stock layers repack their weight, which widths as small as these do not allow
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    with torch.no_grad():
        logits = loaded(**inputs_of(adapted)).logits
    torch.testing.assert_close(logits, adapted.logits(trained, inputs_of(adapted)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, load_tiny(checkpoint, kind=kind).logits({}, inputs_of(adapted)), atol=1e-2)


@pytest.mark.parametrize("kind", [*NEW, "none"])  # LoRA: test_every_method
def test_two_rounds_of_a_federation_learn(tmp_path: Path, kind: str) -> None:
    keys: dict[str, Any] = {"adapter.kind": kind, "client.local-steps": 8, "client.directions": 4}
    keys |= {"client.micro-batch": 0, "client.learning-rate": 0.2, "method": "spry", "server.optimizer": "average"}
    federation = Federation(tmp_path, tiny_run(tmp_path) | keys)
    before = federation.strategy.snapshot()
    federation.start(2)
    first, last = federation.recorder.rounds[1:]
    assert last.train_loss < 0.6 * first.train_loss
    assert last.accuracy > 0.8
    moved = [name for name, tensor in federation.strategy.snapshot().items() if not torch.equal(tensor, before[name])]
    own = {name for unit, names in federation.adapted.units.items() if unit != "head" for name in names}
    assert bool(own & set(moved)) == (kind != "none")
