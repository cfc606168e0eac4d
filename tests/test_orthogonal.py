"""Orthogonal directions: unbiased, exact when there are as many as dimensions, apart for clients that share a frame."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federation import Federation, LocalGrid, make_checkpoint, same, tiny_run
from flwr.app import Message
from torch import Tensor

from spry_app.autodiff.directions import Seed, Tensors, direction, weighted_sum
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.autodiff.orthogonal import Frame
from spry_app.autodiff.slopes import Part
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import METHODS, get_method
from spry_app.methods.replay import Seat, seats
from spry_app.protocol import to_arrays

CLIENTS = 3


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def of_size(dimension: int) -> Tensors:
    """In two tensors, where there is room for two."""
    first = dimension // 3
    return {"b": torch.empty(dimension - first), **({"a": torch.empty(first)} if first else {})}


def estimate(gradient: Tensor, like: Tensors, seed: Seed, directions: int) -> Tensor:
    """From exact slopes of a linear function."""
    slopes = [float(flat(direction(seed, k, like)) @ gradient) for k in range(directions)]
    return flat(weighted_sum(slopes, seed, like))


def test_the_bits_of_a_column_never_change() -> None:
    found = Frame("7 1 2 a b", 6).columns({0: 1.0, 4: -0.5})
    assert found.view("<u4").tolist() == GOLDEN
    drawn = direction(Seed(7, 1, 2, 3, sharing=4), 1, {"b": torch.empty(4), "a": torch.empty(2)})
    assert flat(drawn).float().numpy().view("<u4").tolist() == GOLDEN_DIRECTION


@pytest.mark.parametrize("dimension", [1, 2, 3, 13, 64, 100, 768])
def test_columns_are_orthogonal_and_of_length_root_d(dimension: int) -> None:
    frame = Frame("any", dimension)
    columns = np.stack([frame.columns({number: 1.0}) for number in range(dimension)]).astype(np.float64)
    np.testing.assert_allclose(columns @ columns.T / dimension, np.eye(dimension), atol=2e-6)
    assert np.array_equal(frame.columns({dimension + 1: 1.0}), frame.columns({1 % dimension: 1.0}))


@pytest.mark.parametrize(
    ("dimension", "directions", "sharing"),
    [
        *((dimension, directions, 0) for dimension, directions in [(5, 2), (13, 1), (96, 8)]),
        *((dimension, directions, 1) for dimension, directions in [(5, 2), (13, 1), (13, 12), (96, 8)]),
        *((dimension, directions, 3) for dimension, directions in [(6, 2), (13, 1), (96, 8)]),
    ],
)
def test_estimates_are_unbiased_and_err_as_the_formula_says(dimension: int, directions: int, sharing: int) -> None:
    """Mean and relative squared error within 5 standard errors, for both kinds and for each of those who share."""
    draw = torch.Generator().manual_seed(dimension)
    gradient, like = torch.randn(dimension, generator=draw, dtype=torch.float64), of_size(dimension)
    client = max(0, sharing - 1)
    drawn = torch.stack(
        [estimate(gradient, like, Seed(1, 2, client, step, sharing), directions) for step in range(500)]
    )
    spread = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - gradient).abs() <= 5 * spread + 1e-6).all()
    errors = (drawn - gradient).square().sum(1) / gradient.square().sum()
    expected = (dimension - directions) / directions if sharing else (dimension + 1) / directions
    assert abs(errors.mean() - expected) <= 5 * errors.std() / math.sqrt(len(errors)) + 1e-6


@pytest.mark.parametrize("name", ["forward-mode", "central-difference", "one-sided-difference"])
def test_as_many_directions_as_dimensions_give_backprops_gradient(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(3, 4, generator=draw), "b": torch.randn(3, generator=draw)}
    x, labels = torch.randn(5, 4, generator=draw), torch.tensor([0, 1, 2, 0, 1])
    batch = [Part(lambda p: F.cross_entropy(x @ p["w"].T + p["b"], labels), 1.0)]
    exact = GRADIENTS["backprop"].estimate(batch, params, Seed(0, 0, 0, 0), 1).gradient
    found = GRADIENTS[name].estimate(batch, params, Seed(0, 0, 0, 0, sharing=1), 15, 4).gradient
    close = {"forward-mode": 1e-6, "central-difference": 2e-3, "one-sided-difference": 2e-2}[name]
    torch.testing.assert_close(flat(found), flat(exact), rtol=0, atol=close * float(flat(exact).norm()))


@pytest.mark.parametrize(
    ("dimension", "clients", "directions"),
    [(13, 13, 1), (13, 5, 3), (13, 20, 1), (96, 6, 16), (96, 6, 20), (7, 2, 9), (6, 4, 5)],
)
def test_clients_that_fill_a_frame_have_the_gradient_itself_as_their_mean(
    dimension: int, clients: int, directions: int
) -> None:
    """Though some columns may be measured once more than others."""
    gradient = torch.randn(dimension, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    like = of_size(dimension)
    found = [estimate(gradient, like, Seed(3, 1, client, 2, clients), directions) for client in range(clients)]
    assert float((found[0] - gradient).norm()) > 0.1 * float(gradient.norm()) or directions >= dimension
    torch.testing.assert_close(torch.stack(found).mean(0), gradient, rtol=0, atol=3e-6)


@pytest.mark.parametrize(("dimension", "clients"), [(48, 6), (48, 5), (12, 8), (6, 12), (5, 1)])
def test_whoever_takes_as_many_directions_as_dimensions_has_its_own_gradient(dimension: int, clients: int) -> None:
    """However many share the frame: nobody measures a column twice before all."""
    gradient = torch.randn(dimension, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for client in range(clients):
        found = estimate(gradient, of_size(dimension), Seed(3, 1, client, 2, clients), dimension)
        torch.testing.assert_close(found, gradient, rtol=0, atol=3e-6)


def test_those_who_share_a_frame_take_parts_of_it_that_are_apart() -> None:
    like = of_size(40)
    drawn = torch.stack([flat(direction(Seed(1, 1, c, 1, 4), k, like)) for c in range(4) for k in range(10)])
    torch.testing.assert_close(drawn @ drawn.T, 40 * torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-4)


def test_a_frame_depends_on_names_not_on_their_order_and_differs_from_step_to_step() -> None:
    like = {"a": torch.empty(2, 3), "b": torch.empty(5)}
    seed = Seed(1, 2, 0, 4, sharing=2)
    there, back = direction(seed, 1, like), direction(seed, 1, dict(reversed(like.items())))
    assert same(there, {name: back[name] for name in there})
    assert list(back) == ["b", "a"]
    others = [Seed(0, 2, 0, 4, 2), Seed(1, 0, 0, 4, 2), Seed(1, 2, 0, 0, 2)]
    drawn = [flat(direction(other, 1, like)) for other in others]
    drawn += [flat(direction(seed, 1, {"c": torch.empty(2, 3), "b": torch.empty(5)})), flat(there)]
    assert len({tuple(v.tolist()) for v in drawn}) == len(drawn)


def test_clients_with_the_same_tensors_share_a_frame_and_take_no_more_than_it_has() -> None:
    method = get_method(RunConfig.from_flower({"method": "spry", "directions": "orthogonal"}))
    one, two = {"a": 4}, {"b": 20, "c": 1}
    assert seats(method, [8] * 5, [one, two, one, {}, one]) == [
        Seat(0, 3, 4),
        Seat(0, 1, 8),
        Seat(1, 3, 4),
        Seat(0, 1, 1),
        Seat(2, 3, 4),
    ]
    assert seats(METHODS["spry"], [8, 8], [one, two]) == [Seat(0, 0, 8), Seat(1, 0, 8)]
    shared = get_method(RunConfig.from_flower({"method": "decomfl", "directions": "orthogonal"}))
    assert seats(shared, [8, 8], [two, two]) == [Seat(0, 1, 8)] * 2
    assert seats(METHODS["decomfl"], [8, 8], [two, two]) == [Seat(0, 0, 8)] * 2


def test_candidates_near_the_last_update_cannot_be_orthogonal() -> None:
    with pytest.raises(SpryError, match=r"directions='orthogonal'.* must be \"gaussian\""):
        get_method(RunConfig.from_flower({"method": "fwdllm", "directions": "orthogonal"}))


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    keys = {"num-server-rounds": 100, "server.evaluate-every": 100, "directions": "orthogonal"}
    return tiny_run(tmp_path_factory.mktemp("tiny")) | keys


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.reply == "slopes"])
def test_the_log_and_the_weights_give_the_same_run_to_the_bit(method: str, run_config: dict, tmp_path: Path) -> None:
    """Though a client is away for a round."""

    def away(partition: int, reply: Message) -> Message | None:
        return None if partition == 0 and reply.metadata.group_id == "2" else reply

    results = []
    for send in ("weights", "log"):
        keys = {"method": method, "send": send, "client.directions": 3, "client.local-steps": 2}
        federation = Federation(tmp_path / send, run_config | keys)
        before = federation.strategy.snapshot()
        federation.start(CLIENTS, rounds=3, tamper=away)
        assert [(line.answered, line.refused) for line in federation.recorder.rounds[1:]] == [(n, 0) for n in (3, 2, 3)]
        results.append(federation.strategy.snapshot())
        assert not any(torch.equal(before[name], value) for name, value in results[-1].items())
    assert same(*results)


def test_a_round_whose_clients_fill_the_frame_gives_backprops_gradient(tmp_path: Path) -> None:
    """Through messages, client and strategy: clients with equal rows, and directions for every number."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a b c", "label": 1}\n' * 12)
    found = {}
    for name in ("forward-mode", "backprop"):
        keys = {
            "method": "fedfgd",
            "gradient": name,
            "directions": "orthogonal",
            "model.name": str(make_checkpoint(tmp_path / "tiny")),
            "data.source": str(rows),
            "data.num-labels": 2,
            "data.partition": "iid",
            "data.holdout": 0.0,
            "client.learning-rate": 1.0,
            "client.batch-size": 4,
            "client.local-steps": 1,
            "adapter.targets": "layer.1.attention.self.query",
            "client.directions": 22,
        }
        federation = Federation(tmp_path / name, keys)
        strategy = federation.strategy
        perturbed = sum(strategy.perturbed(strategy.units).values())
        assert name == "backprop" or 2 * 22 < perturbed <= 3 * 22
        grid = LocalGrid(CLIENTS, keys)
        messages = strategy.configure_train(1, to_arrays(strategy.snapshot()), None, grid)
        accepted = strategy._accept(grid.send_and_receive(messages))
        assert len(accepted) == CLIENTS
        found[name] = strategy.pseudo_gradient(accepted)
    for name, value in found["backprop"].items():
        torch.testing.assert_close(found["forward-mode"][name], value, rtol=1e-4, atol=1e-6)


GOLDEN = [1067238513, 1067238513, 3206333553, 3206333553, 1072375466, 3206333553]
GOLDEN_DIRECTION = [1067238513, 1067238513, 2147483648, 3214722161, 2147483648, 3214722161]
