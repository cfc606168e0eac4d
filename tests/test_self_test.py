"""The self-test catches every silent failure that is known, names the module, and lets right models pass."""

import warnings
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from broken_modules import WIDTH, Checkpointed, Detached, Doubled, Network, Tripled, four_bit
from tiny_models import MODELS, tiny_batch, tiny_model, trainables
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from spry_app.autodiff.directions import Seed, Tensors, direction
from spry_app.autodiff.self_check import SelfTestError, self_test
from spry_app.autodiff.slopes import (
    Batch,
    ForwardModeError,
    Objective,
    Part,
    central_difference,
    forward_mode,
)

SEED = Seed(0, 0, 0, 0)
LABELS = torch.tensor([0, 1, 2, 1])


def _problem(
    middle: nn.Module, wrap: Callable[[Network], nn.Module] = lambda network: network
) -> tuple[Objective, Tensors, nn.Module]:
    network = wrap(Network(middle))
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    params = {name: p.detach() for name, p in network.named_parameters() if "middle" not in name}
    return lambda params: F.cross_entropy(functional_call(network, params, x), LABELS), params, network


def _transformer(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Objective, Tensors, nn.Module]:
    model, batch = tiny_model(family, dtype, seed=seed), tiny_batch(3, 8)
    labels = batch.pop("labels")

    def objective(params: Tensors) -> Tensor:
        return F.cross_entropy(functional_call(model, params, kwargs=batch).logits.float(), labels)

    return objective, trainables(model), model


def _slope(objective: Objective, params: Tensors) -> float:
    return forward_mode([Part(objective, 1.0)], params, [direction(SEED, 0, params)])[1][0]


def _true_slope(objective: Objective, params: Tensors) -> float:
    v = direction(SEED, 0, params)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
    grads = torch.autograd.grad(objective(leaves), list(leaves.values()))
    return sum((g * v[n]).sum().item() for n, g in zip(leaves, grads, strict=True))


def _functorch(batch: Batch, params: Tensors, directions: Iterable[Tensors]) -> tuple[float, list[float]]:
    """Slopes as the published code takes them (arXiv 2405.15551)."""
    found: list[tuple[float, float]] = []
    for v in directions:
        tangents = {name: v.get(name, torch.zeros_like(tensor)) for name, tensor in params.items()}
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            loss, slope = torch.func.jvp(batch[0].objective, (params,), (tangents,))
        found.append((loss.item(), slope.item()))
    return found[0][0], [slope for _, slope in found]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_right_models_pass(family: str, dtype: torch.dtype) -> None:
    for seed in range(2):
        self_test(*_transformer(family, dtype, seed), seed=seed)


def test_a_model_whose_lora_b_is_still_zero_passes_and_is_tested_all_the_same() -> None:
    objective, params, model = _transformer("bert")
    fresh = {name: torch.zeros_like(p) if "lora_B" in name else p for name, p in params.items()}
    self_test(objective, fresh, model)
    with pytest.raises(SelfTestError, match="lora_A"):
        self_test(objective, fresh, model, slopes=_without("lora_A"))


def _without(kind: str):
    """A forward mode that gives no slope to one kind of tensor."""

    def rule(batch: Batch, params: Tensors, directions: Iterable[Tensors]) -> tuple[float, list[float]]:
        kept = [{name: torch.zeros_like(t) if kind in name else t for name, t in v.items()} for v in directions]
        return forward_mode(batch, params, kept)

    return rule


@pytest.mark.parametrize("kind", ["query.lora_A", "value.lora_A", "query.lora_B", "classifier"])
def test_one_kind_of_tensor_that_lost_its_slope_is_not_hidden_by_the_others(kind: str) -> None:
    with pytest.raises(SelfTestError):
        self_test(*_transformer("bert"), slopes=_without(kind))


def test_silent_failure_one_functorch_loses_the_tangent_in_a_stock_4_bit_layer() -> None:
    objective, params, network = _problem(four_bit().train())
    lower = {name: tensor for name, tensor in params.items() if "first" in name}
    v = direction(SEED, 0, lower)
    assert _functorch([Part(objective, 1.0)], lower, [v])[1] == [0.0], "no longer silent: this test can go"
    assert abs(_true_slope(objective, lower)) > 0.01
    with pytest.raises(SelfTestError, match=r"'first\.\w+'.*'middle' \(Linear4bit\).*model\.quantization"):
        self_test(objective, params, network, slopes=_functorch)


def test_silent_failure_two_the_4_bit_layer_repacked_for_the_cpu_loses_the_tangent() -> None:
    middle = four_bit().eval()
    if not middle.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes repacks only on a CPU with AVX512-BF16")
    objective, params, network = _problem(middle)
    network.eval()
    lower = {name: tensor for name, tensor in params.items() if "first" in name}
    with pytest.raises(ForwardModeError, match="no tangent"):
        _slope(objective, lower)
    _slope(objective, params)  # with the head it is silent
    with pytest.raises(SelfTestError, match=r"missing.*'middle' \(Linear4bit\).*model\.quantization"):
        self_test(objective, params, network)


def test_silent_failure_three_inference_mode() -> None:
    objective, params, network = _problem(nn.Linear(WIDTH, WIDTH))
    with torch.inference_mode(), pytest.raises(SelfTestError, match=r"torch\.no_grad"):
        self_test(objective, params, network)

    def inside(params: Tensors) -> Tensor:
        with torch.inference_mode():
            return objective(params)

    with pytest.raises(SelfTestError, match=r"'first' \(Linear\).*torch\.no_grad"):
        self_test(inside, params, network)


def test_silent_failure_four_reentrant_checkpointing() -> None:
    objective, params, network = _problem(nn.Identity(), Checkpointed)
    slope = _slope(objective, params)
    truth = central_difference(1e-3)([Part(objective, 1.0)], params, [direction(SEED, 0, params)])[1][0]
    assert abs(slope - truth) > 0.1 * abs(truth), "no longer silent: this test can go"
    with pytest.raises(SelfTestError, match=r"first.*'network\.first' \(Linear\).*turn checkpointing off"):
        self_test(objective, params, network)


def test_reentrant_checkpointing_of_a_transformer_is_named() -> None:
    objective, params, model = _transformer("bert")
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if hasattr(part, "dropout_prob"):
            setattr(part, "dropout_prob", 0.0)  # noqa: B010
    self_test(objective, params, model)
    enable: Callable[..., None] = model.get_submodule("base_model.model").activation_checkpointing_enable
    enable({"use_reentrant": True})
    with warnings.catch_warnings(), pytest.raises(SelfTestError, match=r"layer\.0\..*turn checkpointing off"):
        warnings.simplefilter("ignore")
        self_test(objective, params, model)


def test_an_operation_that_refuses_forward_mode_is_named_too() -> None:
    with pytest.raises(SelfTestError, match=r"missing.*'middle' \(Tripled\).*no forward derivative"):
        self_test(*_problem(Tripled()))


def test_a_wrong_derivative_is_found_and_its_module_named() -> None:
    with pytest.raises(SelfTestError, match=r"'middle' \(Doubled\)"):
        self_test(*_problem(Doubled()))


def test_a_module_that_loses_the_tangent_around_a_right_child_is_named_itself() -> None:
    with pytest.raises(SelfTestError, match=r"'middle' \(Detached\).*\.detach\(\)"):
        self_test(*_problem(Detached()))


def test_without_a_module_the_failure_is_still_an_error() -> None:
    objective, params, _ = _problem(Doubled())
    with pytest.raises(SelfTestError, match=r"'first\.weight'.*central-difference"):
        self_test(objective, params, None)


def test_dropout_left_on_is_an_error() -> None:
    """Published mistake: two losses of a difference with different dropout."""
    objective, params, network = _problem(nn.Dropout(0.5))
    network.train()
    with pytest.raises(SelfTestError, match=r"two losses.*model\.eval\(\)"):
        self_test(objective, params, network)
    network.eval()
    self_test(objective, params, network)


def test_a_loss_that_is_not_a_number_is_an_error() -> None:
    objective, params, network = _problem(nn.Identity())
    with pytest.raises(SelfTestError, match="NaN"):
        self_test(lambda p: objective(p) * float("nan"), params, network)


def test_a_tensor_that_the_model_never_reads_is_no_failure() -> None:
    objective, params, network = _problem(nn.Identity())
    with_idle = params | {"idle": torch.ones(3)}
    self_test(lambda p: objective({name: p[name] for name in params}), with_idle, network)


def test_the_self_test_leaves_parameters_and_hooks_as_they_were() -> None:
    objective, params, network = _problem(Doubled())
    before = {name: tensor.clone() for name, tensor in params.items()}
    with pytest.raises(SelfTestError):
        self_test(objective, params, network)
    assert all(torch.equal(params[name], before[name]) for name in params)
    assert not any(part._forward_hooks for part in network.modules())
