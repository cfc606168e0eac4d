"""What leaves a client, or the server, has the noise that the accountant counts, whatever the method."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, LocalGrid, greedy, make_rows, same, tiny_run

from client_app import app as client_app
from spry_app.client.privacy import protected
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import METHODS, get_method
from spry_app.protocol import EVALUATE, Task, TrainReply, refusal_reason, to_arrays
from spry_app.server.accountant import Release, epsilon
from spry_app.server.strategy import SpryStrategy
from spry_app.slope_log import Entry, Measured

CLIENTS = 3
MODES = ("central", "local")
pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    keys = {"client.candidates": 4, "client.upper-directions": 2, "client.micro-batch": 0}
    return tiny_run(folder) | keys | {"data.test": str(make_rows(folder / "test.jsonl", 16, offset=500))}


def replies(federation: Federation, tamper: Any = None) -> list[tuple[Task, TrainReply]]:
    """Those of a first round, as the server accepts them."""
    strategy, grid = federation.strategy, LocalGrid(CLIENTS, federation.run_config, tamper=tamper)
    messages = strategy.configure_train(1, to_arrays(strategy.snapshot()), None, grid)  # type: ignore[arg-type]
    return strategy._accept(grid.send_and_receive(messages))


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def quiet(federation: Federation) -> SpryStrategy:
    """Its strategy, with less noise than a run may ask for."""
    privacy = federation.config.privacy.model_copy(update={"noise_multiplier": 1e-9})
    federation.strategy.guard.config = federation.config.model_copy(update={"privacy": privacy})
    return federation.strategy


def assert_normal(draws: torch.Tensor, std: float) -> None:
    """Mean 0 and that deviation, within five standard errors of each."""
    count = draws.numel()
    assert abs(float(draws.mean())) < 5 * std / math.sqrt(count)
    assert abs(float(draws.square().mean()) / std**2 - 1) < 5 * math.sqrt(2 / count)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_with_it_or_says_why_not(mode: str, method: str, run_config: dict, tmp_path: Path) -> None:
    keys = {"method": method, "privacy.mode": mode, "num-server-rounds": 1, "client.local-steps": 1}
    if mode == "central" and method == "spry-per-iteration":
        with pytest.raises(SpryError, match=r'Use privacy\.mode="local", or send="weights", or method="decomfl"'):
            get_method(RunConfig.from_flower(keys))
        keys["send"] = "weights"
    federation = Federation(tmp_path, run_config | keys)
    before = federation.strategy.snapshot()
    federation.start(CLIENTS)
    line = federation.recorder.rounds[-1]
    assert (line.answered, line.refused, line.train_loss, line.personalised_accuracy) == (CLIENTS, 0, None, None)
    row = METHODS[method]
    parts = 2 if row.reply == "slopes" and (mode == "local" or row.seeds == "shared") else 1
    assert line.epsilon == epsilon([Release(CLIENTS, CLIENTS)], 1 / (2 * math.sqrt(parts)), 1e-5)
    assert not same(federation.strategy.snapshot(), before)
    assert (tmp_path / "slopes.jsonl").exists() == (parts == 2)
    assert (line.noise is None) or mode == "local"


# -- central -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedavg", "spry", "fedsgd", "baffle"])
def test_the_servers_mean_is_that_of_the_bounded_changes_with_the_noise_that_is_counted(
    method: str, run_config: dict, tmp_path: Path
) -> None:
    """The changes are bounded here by hand, divided by how many were asked, and one client is not heard."""
    clip, multiplier = 0.02, 1.5
    keys = {"method": method, "privacy.mode": "central", "privacy.clip": clip, "privacy.noise-multiplier": multiplier}
    federation = Federation(tmp_path, run_config | keys | {"adapter.rank": 4})
    strategy = federation.strategy
    accepted = strategy.guard.replies(replies(federation, lambda partition, reply: reply if partition else None))
    assert len(accepted) == CLIENTS - 1
    rebuilt = [change for change, _ in strategy.state.changes(strategy.entry(accepted))]
    total: dict[str, torch.Tensor] = {}
    lengths = []
    for index, (task, reply) in enumerate(accepted):
        change = strategy.change(task, reply) | (rebuilt[index] if rebuilt else {})
        lengths.append(float(flat(change).norm()))
        for name, value in change.items():
            total[name] = total.get(name, 0) + value.double() * min(1.0, clip / lengths[-1])
    assert max(lengths) > clip
    asked = {name: sum(name in federation.strategy.asked(t) for t in strategy.tasks.values()) for name in total}
    told = strategy.pseudo_gradient(accepted)
    assert told.keys() == total.keys()
    noise = {name: told[name].double() * asked[name] - total[name] for name in total}
    assert_normal(flat(noise), multiplier * clip)
    assert same(strategy.pseudo_gradient(accepted), told)


def test_the_mean_slopes_of_shared_directions_have_the_noise_that_is_counted(run_config: dict, tmp_path: Path) -> None:
    """What is logged, sent to clients and made into the step; the tensors of the head have noise of their own."""
    clip, multiplier = 0.5, 2.0
    keys = {"method": "decomfl", "privacy.mode": "central", "privacy.clip-slopes": clip, "privacy.clip": 0.02}
    federation = Federation(tmp_path, run_config | keys | {"privacy.noise-multiplier": multiplier})
    strategy = federation.strategy
    accepted = strategy.guard.replies(replies(federation, lambda partition, reply: reply if partition else None))
    (mean,) = strategy.entry(accepted).measured
    for _, reply in accepted:
        assert math.hypot(*(slope for step in reply.slopes for slope in step)) <= clip * (1 + 1e-12)
    draws = []
    for round_ in range(500):
        entry = Entry(round_, (dataclasses.replace(mean, slopes=((0.1, -0.2), (0.3, 0.0)), examples=2),))
        (told,) = strategy.guard.released(entry).measured
        wide = torch.tensor(told.slopes).double() * CLIENTS - 2 * torch.tensor(entry.measured[0].slopes).double()
        draws.append(wide.flatten())
    assert_normal(torch.cat(draws), multiplier * clip)
    exact = strategy.state.exact
    told = strategy.pseudo_gradient(accepted)
    heads = [flat(strategy.change(task, reply)) for task, reply in accepted]
    total = sum(head * min(1.0, 0.02 / float(head.norm())) for head in heads)
    assert_normal(flat({name: told[name] for name in exact}) * CLIENTS - total, multiplier * 0.02)
    before, after = strategy.state.trained(mean, 1)
    rest = {name: before[name] - after[name] for name in before}
    assert all(torch.allclose(told[name], rest[name], rtol=1e-4, atol=1e-7) for name in rest)


def longest_first(accepted: tuple[Task, TrainReply]) -> float:
    return -sum(slope**2 for step in accepted[1].slopes for slope in step)


@pytest.mark.parametrize("method", ["fedavg", "fedsgd", "baffle", "decomfl"])
def test_a_greedy_client_moves_the_sum_by_no_more_than_the_bound(method: str, run_config: dict, tmp_path: Path) -> None:
    """Against the sum without it, at a noise of next to nothing; one client in place of another moves it by twice that
    at the most, which is the sensitivity that the accountant counts with.
    """
    keys = {"method": method, "privacy.mode": "central", "privacy.clip": 0.02, "privacy.clip-slopes": 0.3}
    federation = Federation(tmp_path, run_config | keys)
    strategy = quiet(federation)
    # Who is which client follows from the key: the greedy one has the longest slopes, if there are any.
    everybody = sorted(strategy.guard.replies(replies(federation, greedy)), key=longest_first)
    told = []
    for accepted in (everybody, everybody[1:]):
        entry, mean = strategy.entry(accepted), strategy.pseudo_gradient(accepted)
        slopes = [slope for measured in entry.measured for step in measured.slopes for slope in step]
        names = strategy.state.exact if METHODS[method].seeds == "shared" else mean
        told.append((flat({name: mean[name] for name in names}) * CLIENTS, torch.tensor(slopes).double() * CLIENTS))
    (tensors, slopes), (tensors_without, slopes_without) = told
    assert float((tensors - tensors_without).norm()) == pytest.approx(0.02, rel=1e-3)
    if METHODS[method].seeds == "shared":
        assert float((slopes - slopes_without).norm()) == pytest.approx(0.3, rel=1e-6)


def test_who_takes_part_follows_from_the_key_and_not_from_the_seed(run_config: dict, tmp_path: Path) -> None:
    """Nor does a place in the round tell who else is there; where memory might, sampling is not counted."""
    run_config = run_config | {"method": "fedavg", "privacy.mode": "central", "server.fraction-train": 0.5}
    grid, crews = LocalGrid(6, run_config), []
    for run in ("a", "b"):
        federation = Federation(tmp_path / run, run_config)
        strategy, now = federation.strategy, federation.recorder
        arrays = to_arrays(strategy.snapshot())
        for round_ in (1, 2, 3):
            messages = strategy.configure_train(round_, arrays, None, grid)  # type: ignore[arg-type]
            crews.append([message.metadata.dst_node_id for message in messages])
        assert (now.current.sampled_from, now.current.epsilon) == (6, epsilon([Release(6, 3)] * 3, 0.5, 1e-5))
    assert crews[:3] != crews[3:]
    assert all(len(crew) == len(set(crew)) == 3 for crew in crews)
    assert any(crew != sorted(crew) for crew in crews)
    met = strategy.fleet.introductions
    node = next(iter(met))
    met[node] = dataclasses.replace(met[node], memory_mib=64.0)
    strategy.configure_train(4, arrays, None, grid)  # type: ignore[arg-type]
    assert now.current.sampled_from == 3


def test_groups_of_clients_with_the_same_units_are_divided_by_those_asked(run_config: dict, tmp_path: Path) -> None:
    """Shared directions and dealt units: three clients, of which the server heard the first group alone."""
    keys = {"method": "decomfl", "assign": "cyclic", "privacy.mode": "central"}
    federation = Federation(tmp_path, run_config | keys)
    accepted, strategy = replies(federation), quiet(federation)
    groups = strategy.entry(accepted).measured
    assert len(groups) > 1
    for group in groups:
        asked = sum(
            strategy.state.measured(t.number, t.sharing, t.units, 1, ()).units == group.units
            for t in strategy.tasks.values()
        )
        entry = Entry(1, (Measured(group.client, group.units, 1, ((1.0, 2.0),)),))
        (told,) = strategy.guard.released(entry).measured
        assert told.slopes[0] == pytest.approx((1.0 / asked, 2.0 / asked), abs=1e-6)


# -- local -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spry", "fedsgd", "spry-per-iteration"])
def test_a_reply_is_the_bounded_one_with_the_noise_that_is_counted(
    method: str, run_config: dict, tmp_path: Path
) -> None:
    """The same messages, answered without and with privacy."""
    clip, multiplier = 0.02, 1.5
    keys = {"privacy.mode": "local", "privacy.clip": clip, "privacy.clip-slopes": 0.3}
    keys |= {"privacy.noise-multiplier": multiplier}
    found = []
    for name, more in (("bare", {}), ("private", keys)):
        more = more | {"method": method, "adapter.rank": 4, "server.evaluate-every": 1}
        found.append((federation := Federation(tmp_path / name, run_config | more), replies(federation)))
    (bare, plain), (_, told) = found
    noise = []
    for (task, reply), (_, other) in zip(plain, told, strict=True):
        change, noised = (flat(bare.strategy.change(task, r)) for r in (reply, other))
        assert float(change.norm()) > clip
        noise.append(noised - change * clip / change.norm())
        assert (other.loss, other.personal, reply.personal is None) == (0.0, None, False)
        slopes, theirs = (torch.tensor(r.slopes).double() for r in (reply, other))
        if slopes.numel():
            spread = theirs - slopes * min(1.0, 0.3 / float(slopes.norm()))
            assert 0 < float(spread.norm()) < 5 * multiplier * 0.3 * math.sqrt(slopes.numel())
    assert_normal(torch.cat(noise), multiplier * clip)


def test_slopes_of_a_client_have_the_noise_that_is_counted_and_a_node_keeps_to_its_word(run_config: dict) -> None:
    keys = {"method": "spry-per-iteration", "privacy.mode": "local", "privacy.clip-slopes": 0.3}
    config = RunConfig.from_flower(run_config | keys | {"privacy.noise-multiplier": 1.5})
    method, slopes = get_method(config), ((3.0, -4.0), (0.0, 12.0))
    reply = TrainReply({}, slopes, 0.7, 8, 0.0, 1.0)
    draws, seen = [], set()
    for round_ in range(1, 1001):
        task = Task(round=round_, client=0, tensors={}, units=(), fingerprint="")
        told = protected(reply, task, method, config)
        assert told == protected(reply, task, method, config)
        draws.append((torch.tensor(told.slopes).double() - torch.tensor(slopes).double() * 0.3 / 13).flatten())
        seen.add(told.slopes)
    assert_normal(torch.cat(draws), 1.5 * 0.3)
    assert len(seen) == 1000
    off = RunConfig.from_flower(run_config | {"method": "spry-per-iteration"})
    assert protected(reply, task, method, off) is reply


@pytest.mark.parametrize("mode", MODES)
def test_no_loss_and_no_score_leaves_a_node_even_if_it_is_asked(mode: str, run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config | {"method": "fedavg", "privacy.mode": mode})
    grid = LocalGrid(CLIENTS, federation.run_config)
    (node, context), *_ = grid.contexts.items()
    strategy = federation.strategy
    tensors, units = strategy.snapshot(), tuple(strategy.units)
    task = Task(1, 0, tensors, units, strategy.fingerprint, evaluate=True)
    reply = TrainReply.from_message(client_app(task.to_message(node), context), {})
    assert (reply.loss, reply.personal) == (0.0, None)
    refused = refusal_reason(client_app(task.to_message(node, EVALUATE), context))
    assert "does not say how well the model does on its rows; give the server a test set" in refused
