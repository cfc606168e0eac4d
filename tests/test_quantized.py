"""Quantised linear layers: tangents, gradients and weights are those of the dequantised model."""

import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import SENTENCES, shaken, write_checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from spry_app.config import AdapterConfig, ModelConfig
from spry_app.errors import SpryError
from spry_app.models import AdaptedModel, load_model
from spry_app.models.quantized import Linear4bit, Linear8bit, pass_tangents

KINDS = ["nf4", "fp4", "int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("bert"))


def _load(folder: str, kind: str, dtype: str = "float32", bias: str = "none") -> AdaptedModel:
    config = ModelConfig.model_validate({"name": folder, "quantization": kind, "dtype": dtype, "device": "cpu"})
    return load_model(config, AdapterConfig.model_validate({"rank": 2, "bias": bias}), num_labels=3, seed=0)


def _dequantised(adapted: AdaptedModel) -> AdaptedModel:
    """The same model with ordinary linear layers in place of the quantised ones."""
    for name, module in list(adapted.model.named_modules()):
        if isinstance(module, Linear4bit | Linear8bit):
            plain = nn.Linear(module.in_features, module.out_features)
            plain.weight.data = module.dense_weight(torch.float32)
            plain.bias = module.bias
            adapted.model.set_submodule(name, plain.requires_grad_(False))
    return adapted


def _loss(adapted: AdaptedModel, params: dict[str, Tensor]) -> Tensor:
    inputs = adapted.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    return adapted.logits(params, dict(inputs)).square().sum()


def _native_slope(adapted: AdaptedModel, params: dict[str, Tensor], direction: dict[str, Tensor]) -> float:
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        loss = _loss(adapted, {name: forward_ad.make_dual(params[name], direction[name]) for name in params})
        tangent = forward_ad.unpack_dual(loss).tangent
    assert tangent is not None
    return tangent.item()


@pytest.mark.parametrize("kind", KINDS)
def test_slope_through_quantised_lora_model_is_the_dequantised_models_and_the_central_differences(
    folder: str, kind: str
) -> None:
    adapted, reference = _load(folder, kind), _dequantised(_load(folder, kind))
    assert any(isinstance(module, Linear4bit | Linear8bit) for module in adapted.model.modules())
    assert not any(isinstance(module, Linear4bit | Linear8bit) for module in reference.model.modules())
    params = shaken(adapted.tensors())
    direction = shaken({name: torch.zeros_like(tensor) for name, tensor in params.items()}, 1.0, seed=1)

    slope = _native_slope(adapted, params, direction)

    assert slope == pytest.approx(_native_slope(reference, params, direction), rel=1e-5)
    h = 1e-3
    ends = [{name: params[name] + sign * h * direction[name] for name in params} for sign in (1, -1)]
    with torch.no_grad():
        difference = ((_loss(adapted, ends[0]) - _loss(adapted, ends[1])) / (2 * h)).item()
    assert slope == pytest.approx(difference, rel=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_jvp_through_quantised_model_is_not_silently_zero(folder: str, kind: str) -> None:
    adapted = _load(folder, kind)
    params = shaken(adapted.tensors())
    direction = shaken({name: torch.zeros_like(tensor) for name, tensor in params.items()}, 1.0, seed=1)
    with sdpa_kernel(SDPBackend.MATH):
        _, slope = torch.func.jvp(lambda p: _loss(adapted, p), (params,), (direction,))
    assert slope.item() == pytest.approx(_native_slope(adapted, params, direction), rel=1e-5)
    assert abs(slope.item()) > 1e-3


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_backprop_through_quantised_model_equals_the_dequantised_models(folder: str, kind: str, bias: str) -> None:
    def gradients(adapted: AdaptedModel) -> list[Tensor]:
        params = {name: t.requires_grad_() for name, t in shaken(adapted.tensors()).items()}
        return list(torch.autograd.grad(_loss(adapted, params), list(params.values())))

    for got, expected in zip(
        gradients(_load(folder, kind, bias=bias)), gradients(_dequantised(_load(folder, kind, bias=bias))), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_backprop_graph_keeps_no_dequantised_weight(folder: str, kind: str) -> None:
    adapted = _load(folder, kind)
    layer = next(m for m in adapted.model.modules() if isinstance(m, Linear4bit | Linear8bit))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, layer.in_features, requires_grad=True))
    assert all(tensor.numel() < layer.in_features * layer.out_features for tensor in kept)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluating_does_not_repack_weights_nor_spoil_later_tangents(folder: str, kind: str) -> None:
    adapted = _load(folder, kind)
    layers = [m for m in adapted.model.modules() if isinstance(m, Linear4bit | Linear8bit)]
    before = [(layer.weight.data.clone(), layer.dense_weight(torch.float32)) for layer in layers]
    params = shaken(adapted.tensors())
    direction = {name: torch.ones_like(tensor) for name, tensor in params.items()}
    slope = _native_slope(adapted, params, direction)

    adapted.model.eval()
    with torch.no_grad():
        first, second = _loss(adapted, params), _loss(adapted, params)

    assert first == second
    assert _native_slope(adapted, params, direction) == slope
    for layer, (packed, dense) in zip(layers, before, strict=True):
        assert torch.equal(layer.weight.data, packed)
        assert torch.equal(layer.dense_weight(torch.float32), dense)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_stay_near_the_checkpoints_and_the_head_is_left_in_full(folder: str, kind: str) -> None:
    adapted = _load(folder, kind)
    full = _load(folder, "none")
    query = "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer"
    quantised = adapted.model.get_submodule(query)
    assert isinstance(quantised, Linear4bit | Linear8bit)
    weight = full.model.get_submodule(query).get_parameter("weight")
    error = (quantised.dense_weight(torch.float32) - weight).norm() / weight.norm()
    assert 0 < error < {"nf4": 0.12, "fp4": 0.16, "int8": 0.01}[kind]
    for name in adapted.units["head"]:
        assert torch.equal(adapted.model.get_parameter(name), full.model.get_parameter(name))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_model_trains_float32_adapters_and_answers_in_float32(folder: str, kind: str) -> None:
    adapted = _load(folder, kind, "bfloat16")
    params = shaken(adapted.tensors())
    inputs = adapted.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    logits = adapted.logits(params, dict(inputs))
    assert logits.dtype == torch.float32
    assert {adapted.model.get_parameter(name).dtype for name in params} == {torch.float32}
    torch.testing.assert_close(logits, _load(folder, kind).logits(params, dict(inputs)), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("width", [6, 16, 33, 48, 64, 80, 96, 312, 384])
def test_four_bit_weight_is_code_times_block_maximum_whatever_the_width(width: int, kind: str) -> None:
    stock = bitsandbytes.nn.Linear4bit(width, 5, quant_type=kind, compress_statistics=False)
    original = torch.randn(5, width, generator=torch.Generator().manual_seed(width))
    stock.weight.data = original.clone()
    layer = stock.to("cpu")
    pass_tangents(layer)
    state = layer.weight.quant_state

    nibbles = torch.stack([layer.weight.data.flatten() >> 4, layer.weight.data.flatten() & 15], dim=1).flatten().long()
    maxima = state.absmax.repeat_interleave(state.blocksize)[: original.numel()]
    expected = (state.code[nibbles[: original.numel()]] * maxima).view_as(original)

    torch.testing.assert_close(layer.dense_weight(torch.float32), expected)
    assert (expected - original).norm() / original.norm() < 0.2
    x = torch.randn(3, width)
    torch.testing.assert_close(layer(x), x @ expected.T + layer.bias)


def test_layer_whose_weight_the_checkpoint_lacks_stays_an_ordinary_one(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    adapted = _load(folder, "nf4")
    assert type(adapted.model.get_submodule("base_model.model.bert.pooler.dense")) is nn.Linear
    assert torch.isfinite(_loss(adapted, adapted.tensors()))


def test_asking_for_quantisation_without_bitsandbytes_says_what_to_install(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SpryError, match=r"model\.quantization is 'nf4'.*pip install bitsandbytes"):
        _load(folder, "nf4")
