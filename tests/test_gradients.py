"""Forward gradients are unbiased, backprop is exact, and both share one interface."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_batch, tiny_model, trainables
from torch import Tensor, nn
from torch.func import functional_call

from spry_app.autodiff.directions import Seed, Tensors, direction, weighted_sum
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.autodiff.slopes import Batch, Part


class _Network(nn.Module):
    """Two layers with a hidden square matrix each, so that two tensors have the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        generator = torch.Generator().manual_seed(3)
        for tensor in self.parameters():
            tensor.data = torch.randn(tensor.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return out


def _problem() -> tuple[Batch, Tensors]:
    network = _Network()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def part(rows: slice) -> Part:
        def objective(params: Tensors) -> Tensor:
            return F.cross_entropy(functional_call(network, params, x[rows]), labels[rows])

        return Part(objective, (rows.stop - rows.start) / 6)

    return [part(slice(0, 2)), part(slice(2, 6))], {n: p.detach() for n, p in network.named_parameters()}


def _autograd(batch: Batch, params: Tensors) -> Tensors:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
    sum(part.weight * part.objective(leaves) for part in batch).backward()  # type: ignore[union-attr]
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("name", ["forward-mode", "central-difference"])
def test_the_mean_of_many_estimates_is_backprops_gradient(name: str) -> None:
    """For each tensor, within 5 standard errors at every element; v v' g has variance |g|^2 + g_i^2 at element i.

    The mean over steps and over K would not reach g if all K directions, or same-shaped tensors, shared one v.
    """
    batch, params = _problem()
    truth = _autograd(batch, params)
    steps, directions = 250, 4
    total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in params.items()}
    for step in range(steps):
        estimate = GRADIENTS[name].estimate(batch, params, Seed(7, 0, 0, step), directions)
        for tensor_name, gradient in estimate.gradient.items():
            total[tensor_name] += gradient / steps
    square = sum(g.square().sum().item() for g in truth.values())
    for tensor_name, mean in total.items():
        error = (mean - truth[tensor_name]).abs()
        standard = ((square + truth[tensor_name].square()) / (steps * directions)).sqrt()
        assert (error < 5 * standard).all(), tensor_name
    # The bound bites: the whole error has the size that the theory says, and is small beside the gradient.
    flat = torch.cat([(total[n] - truth[n]).flatten() for n in total])
    expected = (square * (flat.numel() + 1) / (steps * directions)) ** 0.5
    assert 0.5 * expected < flat.norm().item() < 2 * expected
    assert expected < 0.3 * square**0.5


def test_an_estimate_has_the_variance_of_k_independent_directions() -> None:
    """Published mistake: the same v for all K. The relative mean squared error is (d + 1) / K."""
    batch, params = _problem()
    truth = torch.cat([g.flatten() for g in _autograd(batch, params).values()])
    for k, repeats in ((1, 400), (10, 120)):
        errors = []
        for step in range(repeats):
            gradient = GRADIENTS["forward-mode"].estimate(batch, params, Seed(1, 0, k, step), k).gradient
            flat = torch.cat([g.flatten() for g in gradient.values()])
            errors.append(((flat - truth).square().sum() / truth.square().sum()).item())
        mean, expected = sum(errors) / repeats, (truth.numel() + 1) / k
        assert 0.7 * expected < mean < 1.4 * expected


@pytest.mark.parametrize("name", ["forward-mode", "central-difference", "one-sided-difference"])
def test_the_gradient_is_rebuilt_from_slopes_and_seed_alone(name: str) -> None:
    """What a server does that was sent only scalars, bit for bit."""
    batch, params = _problem()
    seed = Seed(1, 2, 3, 4)
    estimate = GRADIENTS[name].estimate(batch, params, seed, 3)
    assert len(set(estimate.slopes)) == 3
    rebuilt = weighted_sum(estimate.slopes, seed, params)
    assert all(torch.equal(estimate.gradient[n], rebuilt[n]) for n in params)


@pytest.mark.parametrize("name", ["forward-mode", "central-difference", "one-sided-difference"])
def test_slopes_are_those_of_the_directions_of_the_seed(name: str) -> None:
    batch, params = _problem()
    truth, seed = _autograd(batch, params), Seed(5, 5, 5, 5)
    slopes = GRADIENTS[name].estimate(batch, params, seed, 2).slopes
    for k, slope in enumerate(slopes):
        v = direction(seed, k, params)
        # The coarsest is the one-sided difference: rounding of the loss 1e-7 over h 1e-4, curvature h |v|^2.
        assert slope == pytest.approx(sum((truth[n] * v[n]).sum().item() for n in truth), abs=0.02)


def test_backprop_is_exact_over_unequal_parts() -> None:
    """Published mistakes: a sum of means, and accumulation into tensors that share memory."""
    batch, params = _problem()
    estimate = GRADIENTS["backprop"].estimate(batch, params, Seed(0, 0, 0, 0), 1)
    truth = _autograd(batch, params)
    for name in params:
        torch.testing.assert_close(estimate.gradient[name], truth[name], rtol=1e-5, atol=1e-7)
    assert estimate.slopes == ()
    assert estimate.loss == pytest.approx(sum(p.weight * p.objective(params).item() for p in batch), rel=1e-6)


def test_gradients_that_autograd_hands_out_as_one_tensor_are_not_summed_twice() -> None:
    """d(a + b) gives both inputs the same tensor; adding a second part in place would count it double."""
    batch = [Part(lambda params: (params["a"] + params["b"]).sum(), weight) for weight in (0.25, 0.75)]
    estimate = GRADIENTS["backprop"].estimate(batch, {"a": torch.zeros(3), "b": torch.zeros(3)}, Seed(0, 0, 0, 0), 1)
    assert estimate.gradient["a"].tolist() == estimate.gradient["b"].tolist() == [1.0, 1.0, 1.0]


def test_backprop_works_where_gradients_are_switched_off_and_leaves_parameters_alone() -> None:
    batch, params = _problem()
    with torch.no_grad():
        gradient = GRADIENTS["backprop"].estimate(batch, params, Seed(0, 0, 0, 0), 1).gradient
    assert all(g.any() for g in gradient.values())
    assert not any(p.requires_grad or p.grad is not None for p in params.values())


def test_a_tensor_the_loss_ignores_has_a_zero_gradient() -> None:
    batch = [Part(lambda params: params["a"].sum(), 1.0)]
    estimate = GRADIENTS["backprop"].estimate(batch, {"a": torch.zeros(2), "b": torch.zeros(3)}, Seed(0, 0, 0, 0), 1)
    assert estimate.gradient["b"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", [name for name in GRADIENTS if name != "bisected-backprop"])  # it has its own file
def test_every_way_gives_fp32_gradients_by_name_on_the_cpu(name: str) -> None:
    model = tiny_model("bert", torch.bfloat16)
    batch = tiny_batch(2, 4)
    labels = batch.pop("labels")

    def objective(params: Tensors) -> Tensor:
        return F.cross_entropy(functional_call(model, params, kwargs=batch).logits.float(), labels)

    params = trainables(model)
    estimate = GRADIENTS[name].estimate([Part(objective, 1.0)], params, Seed(0, 0, 0, 0), 1)
    assert {n: (g.shape, g.dtype, g.device.type) for n, g in estimate.gradient.items()} == {
        n: (p.shape, torch.float32, "cpu") for n, p in params.items()
    }


def test_the_table_is_keyed_by_name() -> None:
    assert {key: row.name for key, row in GRADIENTS.items()} == {key: key for key in GRADIENTS}
    exact = ["backprop", "checkpointed-backprop", "bisected-backprop"]
    assert [key for key, row in GRADIENTS.items() if row.slopes is None] == exact
