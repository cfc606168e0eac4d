"""Slopes of forward mode in every family of models, against backprop: alone, shared, in slices, from a higher block."""

import pytest
import torch
import torch.nn.functional as F
from test_blocks import adapt
from tiny_models import (
    ALL_MODELS,
    MORE_MODELS,
    Float64,
    slopes_by_backprop,
    some_directions,
    tiny_batch,
    tiny_model,
    trainables,
)
from torch import Tensor
from torch.func import functional_call

from spry_app.autodiff.slopes import Objective, Part, forward_mode
from spry_app.models import Entering, NoPrefixError

EXAMPLES = 7
WHOLE = [slice(0, 7)]
UNEQUAL = [slice(0, 1), slice(1, 3), slice(3, 7)]
FORMS = [(family, at_once, WHOLE) for family in MORE_MODELS for at_once in (1, 3)]  # test_slopes has the others
FORMS += [(family, at_once, UNEQUAL) for family in ALL_MODELS for at_once in (1, 3)]
BLOCKS = [
    family for family in ALL_MODELS if family != "albert" and not family.startswith("deberta")
]  # they have no prefix, and say so


def _name(value: object) -> str:
    return (
        value if isinstance(value, str) else f"{len(value)}-slices" if isinstance(value, list) else f"{value}-at-once"
    )


def _objective(model: torch.nn.Module, batch: dict[str, Tensor]) -> Objective:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}

    def loss(params: dict[str, Tensor]) -> Tensor:
        with Float64():
            return F.cross_entropy(functional_call(model, params, kwargs=inputs).logits, batch["labels"])

    return loss


def _cut(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in batch.items()}


def _weight(rows: slice) -> float:
    return (rows.stop - rows.start) / EXAMPLES


@pytest.mark.parametrize(("family", "at_once", "slices"), FORMS, ids=_name)
def test_slopes_are_backprops_in_float64(family: str, at_once: int, slices: list[slice]) -> None:
    model, batch = tiny_model(family, torch.float64), tiny_batch(EXAMPLES)
    params = trainables(model)
    assert any("lora_A" in name for name in params) and all(tensor.any() for tensor in params.values())
    directions = some_directions(params, 3)
    parts = [Part(_objective(model, _cut(batch, rows)), _weight(rows)) for rows in slices]
    _, slopes = forward_mode(parts, params, directions, at_once)
    assert slopes == pytest.approx(slopes_by_backprop(_objective(model, batch), params, directions), rel=1e-9)


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("family", BLOCKS)
def test_slices_that_start_above_the_lowest_block_have_backprops_slopes(family: str, at_once: int) -> None:
    """The truth is of the model without our blocks, whole."""
    model, batch = tiny_model(family, torch.float64), tiny_batch(EXAMPLES)
    truth, params = _objective(model, batch), trainables(model)
    adapted = adapt(tiny_model(family, torch.float64))
    own = {name: tensor for name, tensor in params.items() if adapted.depth([name]) >= 1}
    assert len(adapted.blocks) == 2 and 0 < len(own) < len(params)
    directions = some_directions(own, 3)

    def part(rows: slice) -> Part:
        cut = _cut(batch, rows)
        with Float64():
            entering: Entering = adapted.prefix(cut, 1)

        def loss(moving: dict[str, Tensor]) -> Tensor:
            with Float64():
                return F.cross_entropy(adapted.logits(moving, cut, entering=entering), cut["labels"])

        return Part(loss, _weight(rows))

    _, slopes = forward_mode([part(rows) for rows in UNEQUAL], own, directions, at_once)
    assert slopes == pytest.approx(slopes_by_backprop(truth, params, directions), rel=1e-9)


def test_deberta_has_no_prefix_and_says_so() -> None:
    adapted = adapt(tiny_model("deberta-v2"))
    with pytest.raises(NoPrefixError, match="block 0 returns a tuple, not its hidden states alone"):
        adapted.prefix(tiny_batch(), 1)


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_bf16_slope_is_near_that_of_the_same_weights_in_float64(family: str, seed: int, at_once: int) -> None:
    """Within a tenth of the slopes' size, over 16 directions: seen are 0.6 to 7 %, as much as backprop in bf16 has.

    Layers round to 8 binary digits; norms, softmax and the loss are computed in fp32.
    """
    model, batch = tiny_model(family, torch.bfloat16, seed=seed), tiny_batch(EXAMPLES, seed=seed)
    params = trainables(model)
    directions = some_directions(params, 16)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}

    def loss(own: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, own, kwargs=inputs).logits, batch["labels"])

    slopes = torch.tensor(forward_mode([Part(loss, 1.0)], params, directions, at_once)[1])
    exact = _objective(tiny_model(family, torch.bfloat16, seed=seed).double(), batch)
    truth = torch.tensor(slopes_by_backprop(exact, {name: p.double() for name, p in params.items()}, directions))
    assert 0 < (slopes - truth).norm() < 0.1 * truth.norm()  # and it was bf16 that ran
