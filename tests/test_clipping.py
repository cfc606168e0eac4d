"""One client cannot move the model further than it may, however much it asks for."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, greedy, same, tiny_run
from hypothesis import given
from hypothesis import strategies as st

from spry_app.config import ServerConfig
from spry_app.protocol import TrainReply
from spry_app.server.clipping import clipped

CLIENTS = 3
numbers = st.floats(-1e6, 1e6, width=32)


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_run(tmp_path_factory.mktemp("tiny"))


@given(moves=st.lists(numbers, min_size=2, max_size=6), bound=st.floats(0.01, 1e6))
def test_a_move_keeps_its_direction_and_ends_at_the_bound(moves: list[float], bound: float) -> None:
    start = {"a": torch.tensor([1.0]), "b": torch.full((len(moves) - 1,), -2.0)}
    moved = torch.tensor(moves)
    reply = TrainReply({"a": start["a"] + moved[:1], "b": start["b"] + moved[1:]}, (), 1.0, 8, 0.0, 1.0)
    found = clipped(reply, start, ServerConfig(max_update_norm=bound))
    asked = torch.cat([reply.tensors[name] - start[name] for name in ("a", "b")]).double()
    got = torch.cat([found.tensors[name] - start[name] for name in ("a", "b")]).double()
    if float(asked.norm()) <= bound:
        assert found is reply
    else:
        assert float(got.norm()) == pytest.approx(bound, rel=1e-3, abs=1e-5)
        assert torch.allclose(got, asked * (bound / asked.norm()), rtol=1e-3, atol=1e-5 * bound + 1e-6)


def test_slopes_are_cut_one_by_one() -> None:
    reply = TrainReply({}, ((0.5, -3.0), (9.0, 2.0)), 1.0, 8, 0.0, 1.0)
    assert clipped(reply, {}, ServerConfig(max_slope=2.0)).slopes == ((0.5, -2.0), (2.0, 2.0))
    assert clipped(reply, {}, ServerConfig(max_slope=9.0)) is reply
    assert clipped(reply, {}, ServerConfig()) is reply


@pytest.mark.parametrize("method", ["spry", "fedsgd", "spry-per-iteration", "decomfl"])
def test_a_greedy_client_is_counted_and_moves_the_model_no_further_than_the_bounds(
    method: str, run_config: dict, tmp_path: Path
) -> None:
    """And clients that follow the log get the server's bits, as what was cut is what is logged."""
    bounds = {"server.max-slope": 0.5, "server.max-update-norm": 0.01, "server.optimizer": "sgd"}
    keys = {"method": method, "server.learning-rate": 1.0, "server.head-learning-rate": 1.0, **bounds}
    federation = Federation(tmp_path / "bound", run_config | keys)
    before = federation.strategy.snapshot()
    federation.start(CLIENTS, rounds=1, tamper=greedy)
    (line,) = federation.recorder.rounds[1:]
    assert (line.answered, line.refused) == (3, 0)
    assert line.clipped >= 1
    after = federation.strategy.snapshot()
    moved = {name: after[name] - before[name] for name in after if name in federation.strategy.state.exact}
    if method in ("spry", "fedsgd"):
        moved = {name: after[name] - before[name] for name in after}
    # A mean over clients is no longer than the longest; a tensor that one client alone has may add its own length.
    assert math.sqrt(sum(float(move.square().sum()) for move in moved.values())) <= 0.01 * math.sqrt(CLIENTS) + 1e-6
    assert max(float(value.abs().max()) for value in after.values()) < 10
    free = Federation(tmp_path / "free", run_config | keys | {"server.max-slope": 0.0, "server.max-update-norm": 0.0})
    free.start(CLIENTS, rounds=1, tamper=greedy)
    assert max(float(value.abs().max()) for value in free.strategy.snapshot().values()) > 1e3


def test_clients_that_follow_the_log_follow_what_was_cut(run_config: dict, tmp_path: Path) -> None:
    results = []
    for send in ("weights", "log"):
        keys = {"method": "spry-per-iteration", "send": send, "server.max-slope": 0.05, "server.max-update-norm": 0.01}
        federation = Federation(tmp_path / send, run_config | keys)
        federation.start(CLIENTS, rounds=3, tamper=greedy)
        assert [line.refused for line in federation.recorder.rounds[1:]] == [0, 0, 0]
        results.append(federation.strategy.snapshot())
    assert same(*results)
