"""Rounds of SPRY through the real ClientApp: what is sent, who is asked, what is averaged."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, make_checkpoint, same, tiny_run
from flwr.app import Message

from benchmarks.local_grid import LocalGrid
from spry_app.errors import SpryError
from spry_app.protocol import Task, TrainReply, from_arrays, to_arrays

CLIENTS = 3


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("method", ["spry", "spry-per-iteration"])
def test_the_same_seed_gives_the_same_bits_whatever_the_node_ids(method: str, run_config: dict, tmp_path: Path) -> None:
    results = []
    for run, node_ids in enumerate([(), (5009, 5006, 5003)]):
        federation = Federation(tmp_path / str(run), run_config | {"method": method, "adapter.dropout": 0.2})
        federation.start(CLIENTS, node_ids=node_ids)
        results.append(federation.strategy.snapshot())
    assert same(*results)
    other = Federation(tmp_path / "other", run_config | {"method": method, "seed": 1})
    other.start(CLIENTS)
    assert not same(results[0], other.strategy.snapshot())


@pytest.mark.parametrize("head_gradient", ["exact", "forward"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_server_rebuilds_bit_for_bit_the_update_that_the_client_measured(
    optimizer: str, head_gradient: str, run_config: dict, tmp_path: Path
) -> None:
    """Both modes train alike, so the weights that one sends are the reference for the other's scalars."""
    rebuilt = {}
    run_config = run_config | {"head-gradient": head_gradient, "client.directions-at-once": 2}
    run_config |= {"client.head-learning-rate": 0.2}
    for method in ("spry", "spry-per-iteration"):
        federation = Federation(
            tmp_path / method, run_config | {"method": method, "client.optimizer": optimizer, "client.local-steps": 3}
        )
        strategy, seen = federation.strategy, {}

        def watch(accepted: list, strategy: Any = strategy, seen: dict = seen) -> dict:
            for task, reply in accepted:
                seen[task.client] = reply.tensors
            for measured in strategy.entry(accepted).measured:
                seen[measured.client] |= strategy.state.trained(measured, 1)[1]
            return type(strategy).pseudo_gradient(strategy, accepted)

        strategy.pseudo_gradient = watch
        federation.start(CLIENTS, rounds=1)
        rebuilt[method] = seen
    assert set(rebuilt["spry"]) == set(range(CLIENTS))
    for client in range(CLIENTS):
        assert same(rebuilt["spry"][client], rebuilt["spry-per-iteration"][client])


@pytest.mark.parametrize(("head_gradient", "sent"), [("forward", set()), ("exact", {"head"})])
def test_per_iteration_sends_scalars_and_an_exact_head_as_it_is(
    head_gradient: str, sent: set[str], run_config: dict, tmp_path: Path
) -> None:
    keys = {"method": "spry-per-iteration", "client.local-steps": 0, "head-gradient": head_gradient}
    federation = Federation(tmp_path, run_config | keys)
    sizes = []

    def watch(partition: int, reply: Message) -> Message:
        assert set(reply.content["arrays"]) == {name for unit in sent for name in federation.strategy.units[unit]}
        sizes.append(len(reply.content["metrics"]["slopes"]))
        return reply

    federation.start(CLIENTS, rounds=1, tamper=watch)
    assert sizes == [2] * CLIENTS


def test_a_client_sends_its_own_units_and_nothing_frozen_travels(run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config | {"head": "split"})
    sent: dict[int, set[str]] = {}

    def watch(partition: int, reply: Message) -> Message:
        sent[partition] = set(reply.content["arrays"])
        return reply

    grid = federation.start(CLIENTS, rounds=1, tamper=watch)
    tasks = dict(zip(grid.contexts, range(CLIENTS), strict=True))
    for node, task in federation.strategy.tasks.items():
        asked = {name for unit in task.units for name in federation.strategy.units[unit]}
        assert sent[tasks[node]] == asked
        assert set(task.tensors) == {name for unit in federation.strategy.units.values() for name in unit}
    assert set.union(*sent.values()) == set(federation.strategy.snapshot())


def test_the_head_is_shared_or_dealt(run_config: dict, tmp_path: Path) -> None:
    shared = Federation(tmp_path / "a", run_config).strategy.assign([0.0] * CLIENTS, 1)
    split = Federation(tmp_path / "b", run_config | {"head": "split"}).strategy.assign([0.0] * CLIENTS, 1)
    assert [hand.count("head") for hand in shared] == [1] * CLIENTS
    assert sum(hand.count("head") for hand in split) == 1


def test_a_unit_that_nobody_returned_stays_as_it_was_with_its_moments(run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config | {"head": "split", "server.min-available-nodes": 2})
    federation.start(CLIENTS, rounds=1)
    before = federation.strategy.snapshot()
    lost: set[str] = set()

    def lose(partition: int, reply: Message) -> Message | None:
        if partition != 0:
            return reply
        lost.update(reply.content["arrays"])
        return None

    moments = {
        name: {key: value.clone() for key, value in federation.strategy.state.optimizer._optimizer.state[param].items()}
        for name, param in federation.strategy.state.optimizer._params.items()
    }
    federation.start(CLIENTS, rounds=1, tamper=lose)
    kept = lost - {name for task in list(federation.strategy.tasks.values())[1:] for name in asked(federation, task)}
    after = federation.strategy.snapshot()
    assert kept
    for name in after:
        state = federation.strategy.state.optimizer._optimizer.state[federation.strategy.state.optimizer._params[name]]
        unchanged = torch.equal(after[name], before[name])
        assert unchanged == (name in kept)
        assert all(torch.equal(state[key], moments[name][key]) for key in state) == (name in kept)


def asked(federation: Federation, task: Task) -> dict:
    return federation.strategy.asked(task)


def test_the_mean_is_per_tensor_over_its_trainers_weighted_by_examples(run_config: dict, tmp_path: Path) -> None:
    """By hand: clients with 1, 2 and 5 examples; a tensor that all hold moves by (1*1 + 2*2 + 5*3) / 8."""
    strategy = Federation(tmp_path, run_config).strategy
    tensors = strategy.snapshot()
    unit, *_ = strategy.units
    accepted = []
    for client, (examples, units) in enumerate([(1, ("head",)), (2, (unit, "head")), (5, ("head",))]):
        task = Task(round=1, client=client, tensors=tensors, units=units, fingerprint="")
        moved = {name: value - (client + 1) for name, value in strategy.asked(task).items()}
        shuffled = dict(reversed(moved.items()))
        accepted.append((task, TrainReply(shuffled, (), 1.0, examples, 0.0, 1.0)))
    mean = strategy.pseudo_gradient(accepted)
    assert set(mean) == set(strategy.units["head"]) | set(strategy.units[unit])
    for name in strategy.units["head"]:
        assert torch.allclose(mean[name], torch.full_like(mean[name], (1 * 1 + 2 * 2 + 5 * 3) / 8), atol=1e-6)
    for name in strategy.units[unit]:
        assert torch.allclose(mean[name], torch.full_like(mean[name], 2.0), atol=1e-6)


def test_a_client_starts_from_the_tensors_it_is_sent(run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config)
    far = {name: value + 5.0 for name, value in federation.strategy.snapshot().items()}
    seen = {}

    def watch(partition: int, reply: Message) -> Message:
        seen[partition] = from_arrays(reply.content["arrays"])
        return reply

    for name, param in federation.strategy.state.optimizer._params.items():
        param.data.copy_(far[name])
    federation.start(CLIENTS, rounds=1, tamper=watch)
    for tensors in seen.values():
        assert all((value - far[name]).abs().max() < 4.0 for name, value in tensors.items() if "classifier" in name)


def test_too_few_nodes_end_the_run_in_time_with_a_sentence(run_config: dict, tmp_path: Path) -> None:
    few = {"server.min-available-nodes": 5, "server.wait-timeout-s": 0.2}
    with pytest.raises(SpryError, match=r"3 of 5 nodes connected within 0.2 s"):
        Federation(tmp_path, run_config | few).start(CLIENTS)


def test_a_fraction_of_the_nodes_is_asked_and_never_fewer_than_the_minimum(run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config | {"server.fraction-train": 0.34, "server.min-train-nodes": 2})
    federation.start(6, rounds=2)
    assert [line.asked for line in federation.recorder.rounds[1:]] == [2, 2]


def test_a_node_with_another_base_model_is_refused_by_name(run_config: dict, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    federation = Federation(tmp_path / "run", run_config | {"server.min-available-nodes": 2})
    grid = LocalGrid(CLIENTS, run_config, own=[{}, {"model": str(other)}, {}])
    federation.strategy.start(grid, to_arrays(federation.strategy.snapshot()), num_rounds=1)
    assert federation.recorder.current.asked == CLIENTS - 1
    strict = Federation(tmp_path / "strict", run_config | {"server.min-available-nodes": 3})
    with pytest.raises(SpryError, match=r"2 of 3 connected nodes can be used(?s:.)*base model of this node"):
        strict.strategy.start(grid, to_arrays(strict.strategy.snapshot()), num_rounds=1)


def test_bytes_are_those_of_the_messages_as_serialised(run_config: dict, tmp_path: Path) -> None:
    """Up: three replies of at least four bytes a number trained, with less than 4 KiB around them."""
    federation = Federation(tmp_path, run_config | {"server.fraction-evaluate": 0.0})
    federation.start(CLIENTS, rounds=1)
    numbers = sum(
        value.numel() for task in federation.strategy.tasks.values() for value in asked(federation, task).values()
    )
    up = federation.recorder.rounds[-1].mib_up * 2**20
    assert 4 * numbers < up < 4 * numbers + CLIENTS * 4096


@pytest.mark.parametrize("hands", [[["head"]], [["no.such.unit"], [], []]])
def test_hands_that_do_not_fit_are_refused_in_words(hands: list, run_config: dict, tmp_path: Path) -> None:
    strategy = Federation(tmp_path, run_config).strategy
    strategy.method = dataclasses.replace(strategy.method, assign=lambda deal: hands)
    with pytest.raises(SpryError, match="must make one hand a client"):
        strategy.assign([0.0] * CLIENTS, 1)
