"""DoRA, rsLoRA and several ranks: PEFT's function and file, and the derivative of that function."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from federation import Federation, tiny_run
from peft import PeftModel
from tiny_checkpoints import inputs_of, load_tiny, shaken, write_checkpoint
from tiny_models import slopes_by_backprop, some_directions
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from spry_app.autodiff.self_check import self_test
from spry_app.autodiff.slopes import Part, forward_mode
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.models import save_adapter
from spry_app.models.dora import Dora, lengths

VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True, "rank": 3, "alpha": 2.0},
    "dora": {"dora": True, "rank": 2, "alpha": 4.0},
    "both": {"dora": True, "rslora": True, "rank": 3, "bias": "all"},
    "ranks": {"rank": 2, "rank_pattern": "query:4, value:1", "targets": "all-linear"},
}


def test_the_length_of_a_row_and_its_derivative_are_those_of_the_matrix_multiplied_out() -> None:
    generator = torch.Generator().manual_seed(0)
    linear, conv = nn.Linear(6, 5).double(), Conv1D(5, 6).double()
    conv.weight.data = linear.weight.data.T.clone()
    a, b = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in ((2, 6), (5, 2)))
    plain = (linear.weight.detach() + 0.7 * b @ a).norm(dim=1)
    expected = torch.autograd.grad(plain.square().sum() + plain.sum(), (a, b))
    for layer in (linear, conv):
        found = lengths(layer.requires_grad_(False), a, b, 0.7)
        torch.testing.assert_close(found, plain)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum() + found.sum(), (a, b)), expected)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_adapter_gives_the_same_logits_when_peft_loads_it(tmp_path: Path, family: str, variant: str) -> None:
    base = write_checkpoint(tmp_path / "base", family)
    keys = VARIANTS[variant] | ({"rank_pattern": "c_attn:4"} if family == "gpt2" and variant == "ranks" else {})
    adapted = load_tiny(base, **keys)
    trained, before = shaken(adapted.tensors()), adapted.logits({}, inputs_of(adapted))
    save_adapter(adapted, trained, tmp_path / "adapter")
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=1)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        logits = loaded(**inputs_of(adapted)).logits
    torch.testing.assert_close(logits, adapted.logits(trained, inputs_of(adapted)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, before, atol=1e-2)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_slopes_are_those_of_the_loss(checkpoint: str, quantization: str, variant: str) -> None:
    """Backpropagation's and those of differences, which PEFT's DoRA has not; a change of B moves lengths at once."""
    adapted = load_tiny(checkpoint, model={"quantization": quantization}, **VARIANTS[variant])
    inputs, labels = inputs_of(adapted), torch.tensor([0, 2])

    def loss(params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(adapted.logits(params, inputs), labels)

    self_test(loss, adapted.tensors(), adapted.model)
    own = {name: tensor for name, tensor in shaken(adapted.tensors()).items() if name not in adapted.units["head"]}
    directions = some_directions(own, 3)
    truth = slopes_by_backprop(loss, own, directions)
    for at_once in (1, 3):
        assert forward_mode([Part(loss, 1.0)], own, directions, at_once)[1] == pytest.approx(truth, rel=1e-3, abs=1e-5)


def test_dora_starts_as_the_base_model_quantised_or_not(checkpoint: str) -> None:
    for quantization in ("none", "nf4", "int8"):
        model = {"quantization": quantization}
        plain, dora = load_tiny(checkpoint, model=model, kind="none"), load_tiny(checkpoint, model=model, dora=True)
        assert any(isinstance(module, Dora) for module in dora.model.modules())
        inputs = inputs_of(plain)
        heads = {name: tensor for name, tensor in plain.tensors().items() if name in plain.units["head"]}
        torch.testing.assert_close(dora.logits(heads, inputs), plain.logits({}, inputs), rtol=1e-4, atol=1e-5)


def test_a_matrix_has_the_rank_and_the_scale_that_its_name_is_given(checkpoint: str) -> None:
    adapted = load_tiny(checkpoint, alpha=8.0, **VARIANTS["ranks"])
    shapes = {name: tuple(tensor.shape) for name, tensor in adapted.tensors().items() if "lora_A" in name}
    ranks = {name.split(".lora_A")[0].rpartition(".")[2]: shape[0] for name, shape in shapes.items()}
    assert (ranks["query"], ranks["value"], ranks["key"]) == (4, 1, 2)
    layers = {name.rpartition(".")[2]: part for name, part in adapted.model.named_modules() if hasattr(part, "scaling")}
    assert (layers["query"].scaling["default"], layers["key"].scaling["default"]) == (2.0, 4.0)
    with pytest.raises(SpryError, match=r"adapter\.rank-pattern names q_proj.*dense, key, query, value"):
        load_tiny(checkpoint, rank_pattern="q_proj:3")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"adapter.rank-pattern": "query=4"}, 'adapter.rank-pattern.*as "query:4,value:2"'),
        ({"adapter.rank-pattern": "query:0"}, 'adapter.rank-pattern.*as "query:4,value:2"'),
        (
            {"adapter.dora": True, "adapter.subspace": "core"},
            "adapter.dora is True, which adapter.subspace 'core' does",
        ),
        ({"adapter.rank-pattern": "query:4", "adapter.subspace": "core"}, "adapter.rank-pattern is 'query:4', which"),
        ({"adapter.dora": True, "adapter.kind": "ia3"}, "adapter.dora is True, which adapter.kind 'ia3' does not use"),
        ({"adapter.virtual-tokens": 3}, "adapter.virtual-tokens is 3, which adapter.kind 'lora' does not use"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpryError, match=sentence):
        RunConfig.from_flower(RunConfig.defaults() | keys)


def test_two_rounds_of_a_federation_learn_with_dora(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"adapter.dora": True, "client.local-steps": 8, "client.directions": 4}
    keys |= {"client.micro-batch": 0, "client.learning-rate": 0.2, "method": "spry", "server.optimizer": "average"}
    federation = Federation(tmp_path, tiny_run(tmp_path) | keys)
    before = federation.strategy.snapshot()
    federation.start(2)
    first, last = federation.recorder.rounds[1:]
    assert last.train_loss < 0.6 * first.train_loss
    moved = [name for name, tensor in federation.strategy.snapshot().items() if not torch.equal(tensor, before[name])]
    assert any("magnitude" in name for name in moved)
