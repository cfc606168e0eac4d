"""Slopes are directional derivatives: forward mode's exactly, those of differences to their order in h."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MODELS, tiny_batch, tiny_model, trainables
from torch import Tensor, nn
from torch.func import functional_call

from spry_app.autodiff.directions import Seed, Tensors, direction
from spry_app.autodiff.slopes import (
    Batch,
    ForwardModeError,
    Objective,
    Part,
    SlopeRule,
    central_difference,
    forward_mode,
    one_sided_difference,
)
from spry_app.autodiff.workspace import workspace

SEED = Seed(0, 0, 0, 0)


def _objective(model: nn.Module, batch: dict[str, Tensor]) -> Objective:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return lambda params: F.cross_entropy(functional_call(model, params, kwargs=inputs).logits, batch["labels"])


def _truth(objective: Objective, params: Tensors, v: Tensors) -> tuple[float, float]:
    """Loss, and slope by backpropagation, summed in float64."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in params.items()}
    loss = objective(leaves)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), sum((g.double() * v[n].double()).sum().item() for n, g in zip(leaves, grads, strict=True))


def _norms_in_float64(model: nn.Module) -> nn.Module:
    """Llama's own norm rounds to fp32 whatever the model's format; PyTorch's does not."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_forward_mode_is_backprops_directional_derivative_in_float64(family: str, padded: bool, at_once: int) -> None:
    model = _norms_in_float64(tiny_model(family, torch.float64))
    batch = tiny_batch()
    if not padded:
        batch["input_ids"] = batch["input_ids"].clamp(min=2)
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    objective, params = _objective(model, batch), trainables(model)
    assert any("lora_A" in name for name in params) and all(tensor.any() for tensor in params.values())
    v = [direction(SEED, k, params) for k in range(3)]
    loss, slopes = forward_mode([Part(objective, 1.0)], params, v, at_once)
    for slope, direction_k in zip(slopes, v, strict=True):
        true_loss, truth = _truth(objective, params, direction_k)
        assert abs(slope - truth) < 1e-10 * abs(truth)
        assert abs(loss - true_loss) < 1e-12


@pytest.mark.parametrize("family", MODELS)
def test_forward_mode_agrees_with_backprop_in_fp32(family: str) -> None:
    model = tiny_model(family)
    objective, params = _objective(model, tiny_batch()), trainables(model)
    v = direction(SEED, 0, params)
    loss, (slope,) = forward_mode([Part(objective, 1.0)], params, [v])
    true_loss, truth = _truth(objective, params, v)
    assert abs(slope - truth) < 1e-4 * abs(truth)
    assert abs(loss - true_loss) < 1e-5


def test_forward_mode_of_a_bf16_model_returns_a_slope_near_the_fp32_one() -> None:
    slopes = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("bert", dtype)
        params = trainables(model)
        v = direction(SEED, 0, params)
        slopes.append(forward_mode([Part(_objective(model, tiny_batch()), 1.0)], params, [v])[1][0])
    assert abs(slopes[0] - slopes[1]) < 0.1 * abs(slopes[0])


def _rules() -> list[tuple[str, SlopeRule]]:
    differences = ("central", central_difference(1e-4)), ("one-sided", one_sided_difference(1e-4))
    return [("forward", forward_mode), *differences]


@pytest.mark.parametrize(("name", "rule"), _rules(), ids=lambda value: value if isinstance(value, str) else "")
def test_micro_batches_of_unequal_size_add_up_to_the_whole_batch(name: str, rule: SlopeRule) -> None:
    """Published mistake: a sum of batch means divided by the number of samples."""
    model = tiny_model("bert", torch.float64)
    batch, params = tiny_batch(examples=7), trainables(model)
    parts = [
        Part(_objective(model, {key: value[part] for key, value in batch.items()}), (part.stop - part.start) / 7)
        for part in (slice(0, 1), slice(1, 4), slice(4, 7))
    ]
    v = [direction(SEED, k, params) for k in range(2)]
    whole, sliced = (rule(b, params, v) for b in ([Part(_objective(model, batch), 1.0)], parts))
    # A difference divides the rounding of the loss, 1e-16, by h.
    assert abs(whole[0] - sliced[0]) < 1e-12
    assert sliced[1] == pytest.approx(whole[1], rel=1e-10, abs=1e-11)


cached_model = functools.cache(tiny_model)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_slopes_in_fp32_are_the_same_however_the_step_is_cut(data: st.DataObject) -> None:
    """Whatever the slices, the directions that share a pass and the workspace: to 1e-6 of the size of the slopes."""
    model = cached_model(data.draw(st.sampled_from(sorted(MODELS)), "family"))
    batch, params = tiny_batch(examples=7, seed=data.draw(st.integers(0, 3), "batch")), trainables(model)
    ends = sorted(data.draw(st.sets(st.integers(1, 6)), "cuts") | {0, 7})
    at_once = data.draw(st.integers(1, 3), "at once")
    limit = data.draw(st.sampled_from([200, 5_000]), "workspace")
    v = [direction(SEED, k, params) for k in range(3)]
    whole = forward_mode([Part(_objective(model, batch), 1.0)], params, v)
    parts = [
        Part(_objective(model, {name: value[start:end] for name, value in batch.items()}), (end - start) / 7)
        for start, end in itertools.pairwise(ends)
    ]
    with workspace(limit):
        cut = forward_mode(parts, params, v, at_once)
    assert cut[0] == pytest.approx(whole[0], rel=1e-6)
    assert cut[1] == pytest.approx(whole[1], rel=0, abs=1e-6 * math.hypot(*whole[1]))


def _cubic(params: Tensors) -> Tensor:
    """L(w) = sum (w^3 + w^2): L'(w) v = sum (3 w^2 + 2 w) v; the differences' errors are known in closed form."""
    return sum((w**3 + w**2).sum() for w in params.values())  # type: ignore[return-value]


CUBIC: Batch = [Part(_cubic, 1.0)]
W = {"a": torch.tensor([1.0, -2.0], dtype=torch.float64), "b": torch.tensor(0.5, dtype=torch.float64)}
V = {"a": torch.tensor([1.0, 0.5]), "b": torch.tensor(-2.0)}
SLOPE = 5.0 * 1.0 + 8.0 * 0.5 + 1.75 * -2.0
"""By hand: L' is 5 at 1, 8 at -2, 1.75 at 0.5."""
LOSS = (1 + 1) + (-8 + 4) + (0.125 + 0.25)


def test_differences_divide_by_the_step_and_have_the_error_of_their_order() -> None:
    """Published mistake: difference / 2 * h for difference / (2 * h). For w^3 + w^2 the central difference is off by
    exactly h^2 sum v^3, the one-sided one by h sum (3 w + 1) v^2 + h^2 sum v^3.
    """
    cubes = 1 + 0.125 - 8
    squares = 4 * 1 + -5 * 0.25 + 2.5 * 4
    for h in (0.5, 0.1, 1e-3):
        assert central_difference(h)(CUBIC, W, [V])[1] == pytest.approx([SLOPE + h**2 * cubes], rel=1e-9)
        loss, slopes = one_sided_difference(h)(CUBIC, W, [V])
        assert slopes == pytest.approx([SLOPE + h * squares + h**2 * cubes], rel=1e-9)
        assert loss == pytest.approx(LOSS)
    assert central_difference(1e-5)(CUBIC, W, [V])[0] == pytest.approx(LOSS)
    loss, slopes = forward_mode(CUBIC, W, [V])
    assert [loss, *slopes] == pytest.approx([LOSS, SLOPE], rel=1e-12)


def test_every_direction_gets_its_own_slope_in_order() -> None:
    other = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor(0.0)}
    for _, rule in _rules():
        assert rule(CUBIC, W, iter([V, other]))[1] == pytest.approx([SLOPE, 8.0], abs=1e-2)


def test_a_tensor_without_a_direction_stays_put() -> None:
    for _, rule in _rules():
        assert rule(CUBIC, W, [{"b": torch.tensor(-2.0)}])[1] == pytest.approx([-3.5], abs=1e-2)


def test_measuring_leaves_the_parameters_alone() -> None:
    before = {name: tensor.clone() for name, tensor in W.items()}
    for _, rule in _rules():
        rule(CUBIC, W, [V])
    assert all(torch.equal(W[name], before[name]) and not W[name].requires_grad for name in W)


@pytest.mark.parametrize(("name", "calls"), [("forward", 3), ("central", 6), ("one-sided", 4)])
def test_the_objective_runs_as_often_as_the_method_costs(name: str, calls: int) -> None:
    counted = []

    def objective(params: Tensors) -> Tensor:
        counted.append(torch.is_grad_enabled())
        return _cubic(params)

    dict(_rules())[name]([Part(objective, 1.0)], W, [V, V, V])
    assert counted == [False] * calls


def test_both_losses_of_a_difference_see_the_same_examples_and_dropout() -> None:
    """Published mistake: dropout differing between them. The rules add no randomness: an objective that draws its
    dropout from a fixed state gives the same slope each time, near the derivative of that very network.
    """
    layer = nn.Linear(20, 20, dtype=torch.float64)
    x = torch.ones(4, 20, dtype=torch.float64)

    def objective(params: Tensors) -> Tensor:
        keep = torch.rand(4, 20, generator=torch.Generator().manual_seed(5)) > 0.5
        return (functional_call(layer, params, x) * keep).square().mean()

    params = {name: tensor.detach() for name, tensor in layer.named_parameters()}
    v = direction(SEED, 0, params)
    truth = _truth(objective, params, v)[1]
    for rule in (forward_mode, central_difference(1e-4)):
        assert rule([Part(objective, 1.0)], params, [v])[1] == pytest.approx([truth], rel=1e-6)


def test_a_loss_that_ignores_the_moved_tensors_is_an_error() -> None:
    with pytest.raises(ForwardModeError, match="no tangent"):
        forward_mode([Part(lambda params: torch.tensor(1.0), 1.0)], W, [V])


def test_inference_mode_is_an_error_not_a_lost_slope() -> None:
    with torch.inference_mode(), pytest.raises(ForwardModeError, match=r"no_grad"):
        forward_mode(CUBIC, W, [V])


def test_numbers_are_fetched_once_however_many_parts_and_directions() -> None:
    """Each fetch makes a GPU wait; on the CPU it is the same operator."""
    from torch.profiler import ProfilerActivity, profile

    def fetches(parts: int, directions: int) -> int:
        with profile(activities=[ProfilerActivity.CPU]) as recorder:
            forward_mode([Part(_cubic, 1 / parts)] * parts, W, [V] * directions)
        return sum(event.count for event in recorder.key_averages() if event.key == "aten::_local_scalar_dense")

    assert fetches(4, 3) == fetches(1, 1) == 0
