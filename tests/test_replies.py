"""What each kind of reply carries, against backprop and closed forms: gradients, weights, scalars, losses."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from federation import Federation, same, tiny_run
from flwr.app import Message
from torch import Tensor

from benchmarks.local_grid import LocalGrid
from spry_app.autodiff.directions import Seed
from spry_app.autodiff.slopes import Part
from spry_app.config import RunConfig
from spry_app.data import batches, load_shard
from spry_app.errors import SpryError
from spry_app.methods import METHODS, get_method
from spry_app.objectives import objective, score
from spry_app.protocol import Score, from_arrays, to_arrays
from spry_app.tasks import classification

CLIENTS = 3


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_run(tmp_path_factory.mktemp("tiny")) | {"server.fraction-evaluate": 0.0}


def autograd(federation: Federation, client: int, tensors: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """Gradient of the mean loss over the first `steps` batches of the client, all of them in one pass."""
    config, model = federation.config, federation.adapted
    shard = load_shard(config.data, config.seed, client, CLIENTS).train
    rows = classification.encode(shard, model.tokenizer, config.data.max_length)
    picked = itertools.islice(batches(len(rows), config.client.batch_size, (config.seed, 1, client, 0)), steps)
    leaves = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    objective(model, rows, [row for batch in picked for row in batch], Seed(0, 0, 0, 0))(leaves).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("steps", [0, 2])
def test_fedsgd_sends_backprops_gradient_and_the_server_takes_the_step(
    steps: int, run_config: dict, tmp_path: Path
) -> None:
    """0 steps is one batch. The step is w - rate * (mean of the gradients): all clients have as many examples."""
    rate = 0.5
    keys = {"method": "fedsgd", "client.local-steps": steps, "server.learning-rate": rate}
    federation = Federation(tmp_path, run_config | keys | {"server.head-learning-rate": 0.0})
    before, sent = federation.strategy.snapshot(), {}

    def watch(partition: int, reply: Message) -> Message:
        sent[partition] = from_arrays(reply.content["arrays"])
        assert reply.content["metrics"]["num-examples"] == 8 * max(1, steps)
        return reply

    federation.start(CLIENTS, rounds=1, tamper=watch)
    truth = [autograd(federation, client, before, max(1, steps)) for client in range(CLIENTS)]
    after = federation.strategy.snapshot()
    for name in before:
        for client in range(CLIENTS):
            torch.testing.assert_close(sent[client][name], truth[client][name], rtol=1e-4, atol=1e-6)
        mean = sum(gradient[name] for gradient in truth) / CLIENTS
        torch.testing.assert_close(after[name], before[name] - rate * mean, rtol=1e-4, atol=1e-6)


def test_a_gradient_reply_needs_a_server_with_a_step_size() -> None:
    with pytest.raises(SpryError, match=r"'fedsgd'.*server\.optimizer='average'.*needs a server_optimizer"):
        get_method(RunConfig.from_flower({"method": "fedsgd", "server.optimizer": "average"}))


@pytest.mark.parametrize("method", ["fedmezo", "baffle", "fedzo", "fwdllm"])
def test_a_difference_is_taken_over_the_step_that_the_paper_names(method: str) -> None:
    """At 0, x^2 + x^3 along 1 has the slope h + h^2 by a one-sided difference, h^2 by a central one; exact in fp64."""
    rule = METHODS[method].gradient.slopes
    assert rule is not None
    at, along = {"x": torch.zeros((), dtype=torch.float64)}, {"x": torch.ones((), dtype=torch.float64)}
    _, (slope,) = rule([Part(lambda params: params["x"] ** 2 + params["x"] ** 3, 1.0)], at, [along])
    expected = {"fedmezo": 1e-3**2, "fwdllm": 1e-2**2, "baffle": 1e-4 + 1e-4**2, "fedzo": 1e-4 + 1e-4**2}
    assert slope == pytest.approx(expected[method], rel=1e-6)


def test_the_loss_of_a_round_is_the_mean_over_examples_not_over_batches(run_config: dict, tmp_path: Path) -> None:
    """Published mistake. 24 rows a client in batches of 20 and 4; so small a step leaves the model as it was."""
    keys = {"method": "fedavg", "client.batch-size": 20, "client.local-steps": 0, "client.learning-rate": 1e-12}
    federation = Federation(tmp_path, run_config | keys)
    tensors = federation.strategy.snapshot()
    messages = federation.strategy.configure_train(1, to_arrays(tensors), None, LocalGrid(CLIENTS, run_config | keys))
    (task, reply), *_ = federation.strategy._accept(LocalGrid(CLIENTS, run_config | keys).send_and_receive(messages))
    config, model = federation.config, federation.adapted
    shard = load_shard(config.data, config.seed, task.client, CLIENTS).train
    rows = classification.encode(shard, model.tokenizer, config.data.max_length)
    inputs = rows.batch(range(len(rows)))
    labels = inputs.pop("labels")
    with torch.no_grad():
        truth = F.cross_entropy(model.logits(tensors, inputs), labels).item()
    assert len(rows) == reply.examples == 24
    assert reply.loss == pytest.approx(truth, rel=1e-5)


def test_scalars_stand_for_the_weights_that_a_difference_method_would_send(run_config: dict, tmp_path: Path) -> None:
    """BAFFLE and FedZO measure alike here; what one's scalars are rebuilt to is the other's weights, bit for bit."""
    results = []
    for method in ("baffle", "fedzo"):
        federation = Federation(tmp_path / method, run_config | {"method": method})
        federation.start(CLIENTS, rounds=2)
        results.append(federation.strategy.snapshot())
    assert same(*results)


def test_the_head_takes_local_steps_of_its_own_size(run_config: dict, tmp_path: Path) -> None:
    """One SGD step from equal weights moves in proportion to its size: four times that of the rest, or the same."""
    moves = []
    for head_rate in (0.2, 0.0):
        keys = {"method": "fedavg", "client.local-steps": 1, "client.head-learning-rate": head_rate}
        federation = Federation(tmp_path / str(head_rate), run_config | keys)
        before = federation.strategy.snapshot()
        federation.start(CLIENTS, rounds=1)
        moves.append({name: value - before[name] for name, value in federation.strategy.snapshot().items()})
    for unit, names in federation.adapted.units.items():
        for name in names:
            torch.testing.assert_close(moves[0][name], moves[1][name] * (4 if unit == "head" else 1))


def test_the_global_models_accuracy_is_taken_before_any_further_training(run_config: dict, tmp_path: Path) -> None:
    """Published mistake: evaluation after local fine-tuning, reported as the global model's."""
    keys = {"method": "fedavg", "server.fraction-evaluate": 1.0, "client.learning-rate": 0.2, "client.local-steps": 8}
    federation = Federation(tmp_path, run_config | keys)
    federation.start(CLIENTS, rounds=2)
    config, model = federation.config, federation.adapted
    model.load_tensors(federation.strategy.snapshot())
    total = Score(0.0, {}, 0)
    for client in range(CLIENTS):
        shard = load_shard(config.data, config.seed, client, CLIENTS).heldout
        total += score(model, classification.encode(shard, model.tokenizer, config.data.max_length), 32)
    last = federation.recorder.rounds[-1]
    assert last.loss == pytest.approx(total.loss / total.examples, rel=1e-5)
    assert last.accuracy == total.sums["correct"] / total.examples
    assert last.personalised_accuracy is not None
