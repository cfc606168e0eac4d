"""An exact head beside perturbed units: the head's gradient is autograd's, the rest is what it is without the head."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_batch, tiny_model, trainables
from torch import Tensor
from torch.func import functional_call

from spry_app.autodiff.directions import Seed
from spry_app.autodiff.exact import estimate_with_exact
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.autodiff.memory import peak_mib
from spry_app.autodiff.slopes import Objective, Part

SEED = Seed(1, 2, 3, 4)
FORWARD, BACKPROP = GRADIENTS["forward-mode"], GRADIENTS["backprop"]


def case(family: str, examples: int = 5, length: int = 9) -> tuple[Objective, dict[str, Tensor], set[str]]:
    model = tiny_model(family).requires_grad_(True)
    params = {name: value for name, value in trainables(model).items() if "lora" in name or "modules_to_save" in name}
    model.requires_grad_(False)
    batch = tiny_batch(examples, length)
    labels = batch.pop("labels")

    def objective(replaced: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, replaced, kwargs=batch).logits, labels)

    return objective, params, {name for name in params if "modules_to_save" in name}


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_head_gets_autograds_gradient_and_the_rest_its_forward_gradient(family: str, parts: int) -> None:
    objective, params, head = case(family)
    assert head and head < params.keys()
    batch = [Part(objective, 1 / parts)] * parts
    mixed = estimate_with_exact(FORWARD, batch, params, head, SEED, 3, 2)
    exact = BACKPROP.estimate(batch, params, SEED, 1, 1)
    rest = {name: value for name, value in params.items() if name not in head}
    still = [Part(lambda own: objective(params | own), 1.0)]
    perturbed = FORWARD.estimate(still, rest, SEED, 3, 1)
    assert list(mixed.gradient) == list(params)
    assert mixed.slopes == pytest.approx(perturbed.slopes, rel=1e-4)
    assert mixed.loss == pytest.approx(exact.loss, rel=1e-5)
    for name in params:
        reference = exact.gradient[name] if name in head else perturbed.gradient[name]
        assert torch.allclose(mixed.gradient[name], reference, rtol=1e-3, atol=1e-6), name


def test_a_head_alone_needs_no_direction() -> None:
    objective, params, head = case("bert")
    only = {name: params[name] for name in head}
    estimate = estimate_with_exact(FORWARD, [Part(lambda own: objective(params | own), 1.0)], only, head, SEED, 3, 1)
    assert estimate.slopes == ()
    assert set(estimate.gradient) == head


def test_the_exact_head_stores_no_activations_of_the_network() -> None:
    """A step takes no more than forward mode alone: the backward pass through the head adds nothing at the peak."""
    objective, params, head = case("bert", examples=16, length=48)
    batch = [Part(objective, 1.0)]
    mixed = peak_mib(lambda: estimate_with_exact(FORWARD, batch, params, head, SEED, 1, 1), "cpu")
    alone = peak_mib(lambda: FORWARD.estimate(batch, params, SEED, 1, 1), "cpu")
    assert mixed < 1.1 * alone
