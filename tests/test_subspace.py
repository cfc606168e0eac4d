"""LoRA of few coordinates: the maps, their slopes, what is fixed and agreed upon, what is saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from federation import same
from peft import PeftModel
from safetensors.torch import load_file
from tiny_checkpoints import MAPS, inputs_of, shaken
from tiny_models import Float64, slopes_by_backprop, some_directions
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from spry_app.autodiff.directions import Seed
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.autodiff.slopes import Part, forward_mode
from spry_app.config import AdapterConfig, ModelConfig
from spry_app.errors import SpryError
from spry_app.models import AdaptedModel, Fixed, load_model, save_adapter
from spry_app.models.quantized import pass_tangents
from spry_app.models.subspace import SUBSPACES

SIZES = {"core": 4 * 9, "singular": 4 * 9, "combined": 4 * 5, "shared": 13, "random": 13}
"""Numbers trained beside the head on a model with 4 adapted matrices."""
LAYER = "encoder.layer.{}.attention.self.{}"


def _load(folder: str, quantization: str = "none", seed: int = 0, given: Fixed | None = None, **keys: Any) -> Any:
    model = ModelConfig.model_validate({"name": folder, "device": "cpu", "quantization": quantization})
    return load_model(model, AdapterConfig.model_validate(keys), 3, seed, frame=given)


def _coordinates(adapted: AdaptedModel) -> dict[str, Tensor]:
    return {name: value for name, value in adapted.tensors().items() if name not in adapted.units["head"]}


def _theta(adapted: AdaptedModel, coordinates: dict[str, Tensor]) -> dict[str, Tensor]:
    """LoRA's tensors for these coordinates, as they would be saved, in the format of the model."""
    adapted.load_tensors(coordinates)
    state = adapted.subspace.plain() or adapted.model.state_dict()
    return {name: value.clone() for name, value in state.items() if ".lora_" in name}


def _widen(adapted: AdaptedModel) -> None:
    """To float64. What bitsandbytes makes of a weight is taken as it is: under Float64 its kernel would go astray."""
    for layer in adapted.model.modules():
        if hasattr(layer, "dense_weight"):
            dense = layer.dense_weight(torch.float32)
            layer.dense_weight = dense.to
    adapted.model.double()


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.double().flatten() for value in tensors.values()])


def _unit_vectors(like: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    found = []
    for name, value in like.items():
        for index in range(value.numel()):
            one = {other: torch.zeros_like(tensor) for other, tensor in like.items()}
            one[name].view(-1)[index] = 1.0
            found.append(one)
    return found


# -- the maps ------------------------------------------------------------------------------------------------------


def test_every_map_of_the_table_is_tested() -> None:
    assert {row["subspace"] for row in MAPS.values()} | {"none"} == set(SUBSPACES)


@pytest.mark.parametrize("kind", MAPS)
def test_as_many_numbers_are_trained_as_the_config_says(checkpoint: str, kind: str) -> None:
    adapted = _load(checkpoint, **MAPS[kind])
    own = _coordinates(adapted)
    assert sum(value.numel() for value in own.values()) == SIZES[kind]
    assert not any(value.any() for value in own.values())
    shared = [f"coordinates.{number}" for number in range(4)]
    matrices = [LAYER.format(layer, which) for layer in range(2) for which in ("query", "value")]
    assert list(adapted.units) == [*(shared if kind in ("shared", "random") else matrices), "head"]


@pytest.mark.parametrize("kind", MAPS)
def test_the_map_is_linear_and_keeps_lengths(checkpoint: str, kind: str) -> None:
    """P' P = I, but for "random", where that is so in the mean (below)."""
    adapted = _load(checkpoint, **MAPS[kind])
    adapted.model.double()
    own = _coordinates(adapted)
    start = _flat(_theta(adapted, own))
    columns = torch.stack([_flat(_theta(adapted, one)) - start for one in _unit_vectors(own)], dim=1)
    somewhere = shaken(own, scale=1.0)
    torch.testing.assert_close(_flat(_theta(adapted, somewhere)) - start, columns @ _flat(somewhere))
    if kind != "random":
        torch.testing.assert_close(columns.T @ columns, torch.eye(SIZES[kind]).double(), rtol=0, atol=1e-6)


def test_a_vector_of_thirteen_is_spread_over_all_matrices(checkpoint: str) -> None:
    for kind in ("shared", "random"):
        adapted = _load(checkpoint, **MAPS[kind])
        start, moved = (_theta(adapted, shaken(_coordinates(adapted), scale=s)) for s in (0.0, 1.0))
        assert all((moved[name] - value).abs().max() > 1e-3 for name, value in start.items())
        assert all(start[name].any() == (".lora_A." in name) for name in start)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_singular_frames_of_a_quantised_model_are_those_of_what_it_computes_with(
    checkpoint: str, quantization: str
) -> None:
    adapted = _load(checkpoint, quantization, **MAPS["singular"])
    name = f"base_model.model.bert.{LAYER.format(0, 'query')}"
    dense = adapted.model.get_submodule(name).get_base_layer().dense_weight(torch.float32)
    u, v = (adapted.subspace.sent.tensors[f"{name}.{letter}"] for letter in "UV")
    torch.testing.assert_close(u @ dense @ v.T, torch.diag(torch.linalg.svdvals(dense)[:3]), rtol=1e-4, atol=1e-4)


# -- slopes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("kind", MAPS)
def test_slopes_are_backprops_and_those_of_lora_along_the_mapped_direction(
    checkpoint: str, kind: str, quantization: str
) -> None:
    """In float64, one direction a pass and three: against autograd through the map, and <LoRA's gradient, P v>."""
    adapted = _load(checkpoint, quantization, **MAPS[kind])
    _widen(adapted)
    here = shaken({name: value.double() for name, value in _coordinates(adapted).items()})
    directions = some_directions(here, 3)
    inputs, labels = inputs_of(adapted), torch.tensor([0, 2])

    def loss(model: AdaptedModel, params: dict[str, Tensor]) -> Tensor:
        with Float64():
            return F.cross_entropy(model.logits(params, inputs), labels)

    truth = slopes_by_backprop(lambda params: loss(adapted, params), here, directions)
    assert min(map(abs, truth)) > 1e-6
    for at_once in (1, 3):
        part = Part(lambda params: loss(adapted, params), 1.0)
        assert forward_mode([part], here, directions, at_once)[1] == pytest.approx(truth, rel=1e-9)

    zero = _theta(adapted, {name: torch.zeros_like(value) for name, value in here.items()})
    mapped = [{name: value - zero[name] for name, value in _theta(adapted, v).items()} for v in directions]
    lora = _load(checkpoint, quantization, rank=MAPS[kind]["rank"])
    _widen(lora)
    by_chain_rule = slopes_by_backprop(lambda params: loss(lora, params), _theta(adapted, here), mapped)
    assert by_chain_rule == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("kind", MAPS)
def test_checkpointed_backprop_reaches_the_coordinates(checkpoint: str, kind: str) -> None:
    adapted = _load(checkpoint, **MAPS[kind])
    inputs, here = inputs_of(adapted), shaken(_coordinates(adapted))
    part = Part(lambda params: F.cross_entropy(adapted.logits(params, inputs), torch.tensor([0, 2])), 1.0)
    rows = [GRADIENTS[name] for name in ("backprop", "checkpointed-backprop")]
    one, other = (row.estimate([part], here, None, 1, 1).gradient for row in rows)
    assert all(torch.allclose(value, other[name], atol=1e-6) and value.any() for name, value in one.items())


@pytest.mark.parametrize("kind", MAPS)
def test_as_many_orthogonal_directions_as_coordinates_give_backprops_gradient(checkpoint: str, kind: str) -> None:
    adapted = _load(checkpoint, **MAPS[kind])
    inputs, here = inputs_of(adapted), shaken(_coordinates(adapted))
    part = Part(lambda params: F.cross_entropy(adapted.logits(params, inputs), torch.tensor([0, 2])), 1.0)
    truth = GRADIENTS["backprop"].estimate([part], here, None, 1, 1).gradient
    seed = Seed(run=0, round=1, client=0, step=0, sharing=1)
    found = GRADIENTS["forward-mode"].estimate([part], here, seed, SIZES[kind], 4).gradient
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", MAPS)
def test_part_of_the_coordinates_can_be_replaced(checkpoint: str, kind: str) -> None:
    """The others are as loaded; and the model is left as it was."""
    adapted = _load(checkpoint, **MAPS[kind])
    here, there = shaken(_coordinates(adapted)), shaken(_coordinates(adapted), seed=1)
    adapted.load_tensors(here)
    (first, *_), before = here, _theta(adapted, {})
    mixed = adapted.logits({first: there[first]}, inputs_of(adapted))
    assert same(before, _theta(adapted, {}))
    adapted.load_tensors({first: there[first]})
    torch.testing.assert_close(adapted.logits({}, inputs_of(adapted)), mixed)
    torch.testing.assert_close(adapted.model(**inputs_of(adapted)).logits, mixed)
    assert not torch.allclose(mixed, adapted.logits(here, inputs_of(adapted)), atol=1e-4)


@pytest.mark.parametrize("kind", ["shared", "random"])
def test_shared_coordinates_lie_as_deep_as_the_lowest_matrix_they_move(checkpoint: str, kind: str) -> None:
    upper = ",".join(f"bert.{LAYER.format(1, which)}" for which in ("query", "value"))
    for targets, depth in (("", 0), (upper, 1)):
        adapted = _load(checkpoint, targets=targets, **MAPS[kind])
        assert {adapted.depths()[name] for name in _coordinates(adapted)} == {depth}
        assert adapted.depth(_coordinates(adapted)) == depth


# -- what is fixed, and saved --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAPS)
def test_nodes_agree_on_what_is_fixed_whatever_else_they_have_drawn(checkpoint: str, kind: str) -> None:
    adapters = []
    for before, seed in ((1, 0), (2, 0), (3, 1)):
        torch.manual_seed(before)
        adapters.append(_load(checkpoint, seed=seed, **MAPS[kind]))
    one, again, other = adapters
    assert one.fingerprint == again.fingerprint
    assert same(one.subspace.fixed.tensors, again.subspace.fixed.tensors)
    assert (one.fingerprint == other.fingerprint) == (kind == "singular")
    assert one.fingerprint.partition("+")[0] == _load(checkpoint).fingerprint


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", MAPS)
def test_what_is_saved_is_lora_that_peft_loads(tmp_path: Path, checkpoint: str, kind: str, quantization: str) -> None:
    adapted = _load(checkpoint, quantization, alpha=6.0, **MAPS[kind])
    trained = shaken(adapted.tensors())
    save_adapter(adapted, trained, tmp_path / "adapter")
    save_adapter(_load(checkpoint, quantization, alpha=6.0, rank=MAPS[kind]["rank"]), {}, tmp_path / "lora")
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("adapter", "lora")]
    shapes = [
        {name: value.shape for name, value in load_file(tmp_path / saved / "adapter_model.safetensors").items()}
        for saved in ("adapter", "lora")
    ]
    assert configs[0] == configs[1] and shapes[0] == shapes[1]
    stock = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["classifier"]}
    quantised = {"quantization_config": BitsAndBytesConfig(**stock)} if quantization == "nf4" else {}
    fresh = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3, **quantised)
    pass_tangents(fresh)  # the stock layers repack their weight, which widths as small as these do not allow
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        logits = loaded(**inputs_of(adapted)).logits
    torch.testing.assert_close(logits, adapted.logits(trained, inputs_of(adapted)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, _load(checkpoint).logits({}, inputs_of(adapted)), atol=1e-2)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"rank": 17, "subspace": "core"}, r"adapter\.rank is 17, and .*query has 16 inputs and 16 outputs"),
        (
            {"subspace": "shared", "coordinates": 129},
            r"adapter\.coordinates is 129, and LoRA of adapter\.rank 1 has 128",
        ),
        ({"subspace": "random", "coordinates": 129}, r"adapter\.coordinates is 129, and LoRA"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(checkpoint: str, keys: dict, sentence: str) -> None:
    with pytest.raises(SpryError, match=sentence):
        _load(checkpoint, **keys)


def test_a_frame_of_another_model_is_refused(checkpoint: str) -> None:
    frame = _load(checkpoint, **MAPS["singular"]).subspace.sent
    with pytest.raises(SpryError, match=r"adapter\.frame='singular'\) is for other matrices .* adapter\.rank=2"):
        _load(checkpoint, given=frame, **MAPS["singular"] | {"rank": 2})


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("kind", ["combined", "shared"])
def test_biases_and_dropout_go_with_a_subspace(tmp_path: Path, checkpoint: str, kind: str, bias: str) -> None:
    adapted = _load(checkpoint, bias=bias, dropout=0.5, **MAPS[kind])
    names = {name for unit in adapted.units.values() for name in unit}
    assert {name for name in names if name.endswith("bias")} == {
        name for unit in _load(checkpoint, bias=bias).units.values() for name in unit if name.endswith("bias")
    }
    trained = shaken(adapted.tensors())
    one, again, none = (adapted.logits(trained, inputs_of(adapted), dropout=seed) for seed in (3, 3, None))
    assert torch.equal(one, again) and not torch.equal(one, none)
    save_adapter(adapted, trained, tmp_path)
    fresh = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    torch.testing.assert_close(loaded(**inputs_of(adapted)).logits, none, rtol=1e-5, atol=1e-5)
