"""Noise in a federation: what metrics.jsonl says of it, and what is done about it on request."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, same, tiny_run
from flwr.app import Message

from spry_app.methods import METHODS
from spry_app.methods.noise import relative_noise
from spry_app.protocol import from_arrays
from spry_app.server.rebuild import rebuild
from spry_app.server.record import Round

CLIENTS = 3


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    keys = {"server.fraction-evaluate": 0.0, "num-server-rounds": 100, "server.evaluate-every": 100}
    return tiny_run(tmp_path_factory.mktemp("tiny")) | keys | {"client.local-steps": 1}


def lines_of(federation: Federation) -> list[dict[str, Any]]:
    return [json.loads(line) for line in federation.recorder.metrics_path.read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_every_round_says_how_much_of_it_was_noise(method: str, run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config | {"method": method, "client.candidates": 4})
    federation.start(CLIENTS, rounds=1)
    before, line = lines_of(federation)
    assert before["noise"] is None
    noise, units = line["noise"], federation.strategy.units
    # A unit that one client holds: known from theory where there are slopes, else not at all.
    holders = {unit: sum(unit in task.units for task in federation.strategy.tasks.values()) for unit in units}
    slopes = METHODS[method].gradient.slopes is not None
    assert noise["units"].keys() == {unit for unit in units if slopes or holders[unit] > 1}
    shared = METHODS[method].seeds == "shared"
    for unit, of_unit in noise["units"].items():
        assert of_unit["estimates"] == (1 if shared and unit != "head" else holders[unit])
        assert 0 <= of_unit["cosine"] <= 1
    assert Round.from_json(json.dumps(line)).noise == noise


@pytest.mark.parametrize("method", ["fedavg", "fedsgd"])
def test_the_numbers_are_those_of_the_replies(method: str, run_config: dict, tmp_path: Path) -> None:
    """By hand, for three clients with as many examples each: s^2 / 3 of torch's sample variance."""
    federation = Federation(tmp_path, run_config | {"method": method})
    before, seen = federation.strategy.snapshot(), []

    def watch(partition: int, reply: Message) -> Message:
        tensors = from_arrays(reply.content["arrays"])
        seen.append({n: v if method == "fedsgd" else before[n] - v for n, v in tensors.items()})
        return reply

    federation.start(CLIENTS, rounds=1, tamper=watch)
    noise = lines_of(federation)[1]["noise"]
    signals, noises = 0.0, 0.0
    for unit, names in federation.strategy.units.items():
        x = torch.stack([torch.cat([change[name].flatten() for name in names]) for change in seen]).double()
        of_mean = float(x.var(0).sum()) / CLIENTS
        signal = float(x.mean(0).square().sum()) - of_mean
        assert noise["units"][unit]["signal-to-noise"] == pytest.approx(signal / of_mean, rel=1e-3)
        signals, noises = signals + signal, noises + of_mean
    assert noise["signal-to-noise"] == pytest.approx(signals / noises, rel=1e-3)
    assert noise["cosine"] == pytest.approx((signals / (signals + noises)) ** 0.5, rel=1e-3)


def test_a_unit_of_one_client_is_known_from_theory_and_orthogonal_clients_share_theirs(
    run_config: dict, tmp_path: Path
) -> None:
    """Two LoRA matrices of 64 numbers each a block; K is 2."""
    for directions, assign, cosine in [
        ("gaussian", "cyclic", (2 / (2 * 64 + 2 + 1)) ** 0.5),
        ("orthogonal", "every-unit", (3 * 2 / (4 * 64)) ** 0.5),
    ]:
        keys = {"method": "spry", "directions": directions, "assign": assign}
        federation = Federation(tmp_path / directions, run_config | keys)
        federation.start(CLIENTS, rounds=1)
        units = lines_of(federation)[1]["noise"]["units"]
        adapter = [task.units[:-1] for task in federation.strategy.tasks.values()]
        worst = max(adapter, key=len)[0]
        assert units[worst] == {
            "estimates": 1,
            "signal-to-noise": pytest.approx(cosine**2 / (1 - cosine**2), rel=1e-3),
            "cosine": pytest.approx(cosine, rel=1e-3),
        }
        assert units["head"]["estimates"] == CLIENTS


@pytest.mark.parametrize("method", ["spry", "spry-per-iteration", "fedavg", "decomfl"])
def test_a_run_of_mostly_noise_is_warned_of_once(method: str, run_config: dict, tmp_path: Path) -> None:
    keys = {"method": method, "client.directions": 1, "assign": "every-unit", "adapter.rank": 4}
    federation = Federation(tmp_path, run_config | keys)
    federation.start(CLIENTS, rounds=2)
    said = {
        "spry": f"d=1,024, K=1, 3 of 3 clients a unit: expected cosine {(3 / (1024 + 3 + 1)) ** 0.5:.2g}, below 0.1",
        "decomfl": f"d=1,024, K=1, 1 of 1 clients a unit: expected cosine {(1 / (1024 + 1 + 1)) ** 0.5:.2g}, below 0.1",
    }
    said["spry-per-iteration"] = said["spry"]
    assert len(federation.recorder.warnings) == (method in said)
    assert all(sentence.startswith(said[method]) for sentence in federation.recorder.warnings)


@pytest.mark.parametrize(
    ("method", "head"), [("spry", "exact"), ("spry-per-iteration", "exact"), ("baffle", "forward")]
)
def test_a_scaled_step_is_the_cosine_times_the_step(method: str, head: str, run_config: dict, tmp_path: Path) -> None:
    """The first round is the same with and without; a head with an exact gradient takes its whole step."""
    moved = []
    for scale in (False, True):
        keys = {"method": method, "noise.scale-step": scale, "head-gradient": head, "server.optimizer": "adam"}
        federation = Federation(tmp_path / str(scale), run_config | keys)
        before = federation.strategy.snapshot()
        federation.start(CLIENTS, rounds=1)
        after = federation.strategy.snapshot()
        moved.append({name: after[name] - value for name, value in before.items()})
    strategy = federation.strategy
    for unit, names in strategy.units.items():
        exact = not strategy.perturbed([unit])
        holders = [strategy.perturbed(task.units) for task in strategy.tasks.values() if unit in task.units]
        noise = 0.0
        for hand in holders:
            noise += (sum(hand.values()) + 1) / 2 / len(holders) ** 2
        cosine = 1.0 if exact else (1 + noise) ** -0.5
        for name in names:
            torch.testing.assert_close(moved[1][name], moved[0][name] * cosine, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("directions", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.reply == "slopes"])
def test_whoever_follows_the_log_scales_to_the_same_bits(
    method: str, directions: str, run_config: dict, tmp_path: Path
) -> None:
    """A client is away in round 2, so fewer hold its units; and the adapter is made again from the log."""

    def away(partition: int, reply: Message) -> Message | None:
        return None if partition == 0 and reply.metadata.group_id == "2" else reply

    results = []
    for send in ("weights", "log"):
        keys = {"method": method, "send": send, "noise.scale-step": True, "directions": directions}
        federation = Federation(tmp_path / send, run_config | keys | {"server.optimizer": "yogi"})
        federation.start(CLIENTS, rounds=4, tamper=away)
        assert [line.answered for line in federation.recorder.rounds[1:]] == [3, 2, 3, 3]
        assert not any(line.refused for line in federation.recorder.rounds)
        results.append(federation.strategy.snapshot())
    assert same(*results)
    assert rebuild(tmp_path / "log" / "slopes.jsonl", tmp_path / "adapter") == 4


@pytest.mark.parametrize("directions", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("method", ["spry", "spry-per-iteration", "decomfl"])
def test_a_target_takes_the_fewest_directions_that_reach_it(
    method: str, directions: str, run_config: dict, tmp_path: Path
) -> None:
    """Four units of 64 numbers on three clients: one of them holds two under SPRY's split, every one all of DeComFL."""
    target = 0.25
    keys = {"method": method, "directions": directions, "noise.target-cosine": target, "client.directions": 64}
    federation = Federation(tmp_path, run_config | keys)
    federation.start(CLIENTS, rounds=1)
    assert federation.recorder.current.answered == CLIENTS
    assert not federation.recorder.warnings
    taken = {len(task.units) - 1: task.directions for task in federation.strategy.tasks.values()}
    assert set(taken) == ({4} if method == "decomfl" else {1, 2})
    for units, count in taken.items():
        enough, less = (relative_noise(64 * units, n, directions) for n in (count, count - 1))
        assert (1 + enough) ** -0.5 >= target - 1e-9
        assert (1 + less) ** -0.5 < target


@pytest.mark.parametrize(("target", "asked"), [(0.0, 2), (0.05, 2), (0.2, 4), (0.9, 7)])
def test_more_clients_take_part_where_directions_do_not_do(
    target: float, asked: int, run_config: dict, tmp_path: Path
) -> None:
    """By hand: 256 numbers on all m clients, 3 directions each: sqrt(3 m / (257 + 3 m)) is 0.184 for 3, 0.211 for 4."""
    keys = {"method": "fedfgd", "noise.target-cosine": target, "client.directions": 3, "server.fraction-train": 0.1}
    federation = Federation(tmp_path, run_config | keys)
    federation.start(7, rounds=1)
    assert federation.recorder.current.answered == asked
    assert {task.directions for task in federation.strategy.tasks.values()} == {1 if target == 0.05 else 3}
    (sentence,) = federation.recorder.warnings if target in (0.05, 0.9) else ("",)
    assert ("below 0.9" in sentence) == (target == 0.9)


def test_clients_that_follow_the_log_need_not_know_the_target(run_config: dict, tmp_path: Path) -> None:
    results = []
    for send in ("weights", "log"):
        keys = {"noise.target-cosine": 0.2, "client.directions": 64, "noise.scale-step": True}
        federation = Federation(tmp_path / send, run_config | keys | {"method": "spry-per-iteration", "send": send})
        federation.start(CLIENTS, rounds=3)
        assert [line.answered for line in federation.recorder.rounds[1:]] == [3, 3, 3]
        assert len({task.directions for task in federation.strategy.tasks.values()}) == 2
        results.append(federation.strategy.snapshot())
    assert same(*results)
    assert rebuild(tmp_path / "log" / "slopes.jsonl", tmp_path / "adapter") == 3
