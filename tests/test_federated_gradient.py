"""The federated forward gradient is unbiased for clients that are alike (SPRY, Theorem 4.1 with no heterogeneity)."""

from pathlib import Path

import pytest
import torch
from federation import Federation, make_checkpoint, make_rows

from benchmarks.local_grid import LocalGrid
from spry_app.autodiff.directions import Seed
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.data import load_shard
from spry_app.objectives import batch_of
from spry_app.protocol import to_arrays
from spry_app.tasks import classification

CLIENTS, ROUNDS = 3, 150


@pytest.mark.slow
@pytest.mark.parametrize(("method", "head_gradient"), [("spry", "forward"), ("spry-per-iteration", "exact")])
def test_the_mean_of_many_rounds_is_backprops_gradient_within_five_standard_errors(
    method: str, head_gradient: str, tmp_path: Path
) -> None:
    """Client SGD, one step on the whole shard: every round's pseudo-gradient / step size estimates the gradient."""
    rate = 0.01
    run_config = {
        "method": method,
        "model.name": str(make_checkpoint(tmp_path / "tiny")),
        "data.source": str(make_rows(tmp_path / "rows.jsonl", 24)),
        "data.num-labels": 2,
        "data.partition": "iid",
        "data.holdout": 0.0,
        "client.learning-rate": rate,
        "client.batch-size": 8,
        "client.micro-batch": 0,
        "client.directions": 2,
        "client.directions-at-once": 2,
        "client.local-steps": 1,
        "num-server-rounds": 10_000,
        "server.evaluate-every": 10_000,
        "head": "split",
        "send": "weights",  # the tensors are changed below, which a slope log cannot tell
        "head-gradient": head_gradient,
    }
    federation = Federation(tmp_path / "run", run_config)
    strategy = federation.strategy
    for name, param in strategy.state.optimizer._params.items():
        if "lora_B" in name:
            param.data.copy_(0.3 * torch.ones_like(param))
    tensors = strategy.snapshot()
    rows = [
        classification.encode(
            load_shard(federation.config.data, 0, index, CLIENTS).train, federation.adapted.tokenizer, 64
        )
        for index in range(CLIENTS)
    ]
    assert [len(shard) for shard in rows] == [8] * CLIENTS
    at = Seed(run=0, round=0, client=0, step=0)
    exact = [
        GRADIENTS["backprop"].estimate(batch_of(federation.adapted, shard, range(8), 0, at), tensors, at, 1).gradient
        for shard in rows
    ]
    grid = LocalGrid(CLIENTS, run_config)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in tensors}
    for round_ in range(1, ROUNDS + 1):
        messages = strategy.configure_train(round_, to_arrays(tensors), None, grid)
        accepted = strategy._accept(grid.send_and_receive(messages))
        for name, value in strategy.pseudo_gradient(accepted).items():
            seen[name].append(value / rate)
    for name, estimates in seen.items():
        drawn = torch.stack(estimates)
        error = drawn.mean(0) - sum(gradient[name] for gradient in exact) / CLIENTS
        assert (error.abs() <= 5 * drawn.std(0) / len(drawn) ** 0.5 + 1e-6).all(), name
