"""Rounds of SPRY through the real ClientApp: what is sent, what is refused, what is averaged."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, make_checkpoint, make_rows
from flwr.app import ArrayRecord, Message, MetricRecord

from spry_app.errors import SpryError
from spry_app.protocol import Task, TrainReply, from_arrays, to_arrays

CLIENTS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 96)


@pytest.fixture
def run_config(checkpoint: Path, rows: Path) -> dict[str, Any]:
    return {
        "method": "spry",
        "model.name": str(checkpoint),
        "data.source": str(rows),
        "data.num-labels": 2,
        "data.partition": "iid",
        "data.holdout": 0.25,
        "client.learning-rate": 0.05,
        "client.batch-size": 8,
        "client.local-steps": 2,
        "client.directions": 2,
        "server.learning-rate": 0.05,
        "num-server-rounds": 2,
        "server.evaluate-every": 2,
    }


def tensors_of(federation: Federation) -> dict[str, torch.Tensor]:
    return federation.strategy.snapshot()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["spry", "spry-per-iteration", "fedavg"])
def test_a_federation_learns(method: str, run_config: dict, tmp_path: Path) -> None:
    steps = {"client.local-steps": 4, "client.directions": 4, "num-server-rounds": 25, "client.learning-rate": 0.1}
    steps |= {"server.evaluate-every": 25}
    federation = Federation(tmp_path, run_config | steps | {"method": method})
    federation.start(CLIENTS)
    losses = [line.train_loss for line in federation.recorder.rounds[1:]]
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])
    assert federation.recorder.rounds[-1].accuracy > 0.8


@pytest.mark.parametrize("method", ["spry", "spry-per-iteration"])
def test_the_same_seed_gives_the_same_bits_whatever_the_node_ids(method: str, run_config: dict, tmp_path: Path) -> None:
    results = []
    for run, first_id in enumerate((100, 5000)):
        federation = Federation(tmp_path / str(run), run_config | {"method": method, "adapter.dropout": 0.2})
        federation.start(CLIENTS, first_id=first_id)
        results.append(tensors_of(federation))
    assert same(*results)
    other = Federation(tmp_path / "other", run_config | {"method": method, "seed": 1})
    other.start(CLIENTS)
    assert not same(results[0], tensors_of(other))


@pytest.mark.parametrize("head_gradient", ["exact", "forward"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_server_rebuilds_bit_for_bit_the_update_that_the_client_measured(
    optimizer: str, head_gradient: str, run_config: dict, tmp_path: Path
) -> None:
    """Both modes train alike, so the weights that one sends are the reference for the other's scalars."""
    rebuilt = {}
    run_config |= {"head-gradient": head_gradient, "client.directions-at-once": 2}
    for method in ("spry", "spry-per-iteration"):
        federation = Federation(
            tmp_path / method, run_config | {"method": method, "client.optimizer": optimizer, "client.local-steps": 3}
        )
        strategy, seen = federation.strategy, {}

        def watch(accepted: list, strategy: Any = strategy, seen: dict = seen) -> dict:
            seen.update({task.client: strategy.trained(task, reply) for task, reply in accepted})
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
    assert set.union(*sent.values()) == set(tensors_of(federation))


def test_the_head_is_shared_or_dealt(run_config: dict, tmp_path: Path) -> None:
    shared = Federation(tmp_path / "a", run_config).strategy.assign(CLIENTS, 1)
    split = Federation(tmp_path / "b", run_config | {"head": "split"}).strategy.assign(CLIENTS, 1)
    assert [hand.count("head") for hand in shared] == [1] * CLIENTS
    assert sum(hand.count("head") for hand in split) == 1


def breaking(how: str) -> Any:
    """A tamper function that spoils the reply of partition 0."""

    def spoil(partition: int, reply: Message) -> Message | None:
        if partition != 0:
            return reply
        arrays = reply.content["arrays"]
        tensors = dict(arrays.to_torch_state_dict())
        first = next(iter(tensors))
        if how == "lost":
            return None
        if how == "nan":
            tensors[first] = torch.full_like(tensors[first], math.nan)
        elif how == "missing":
            del tensors[first]
        elif how == "misshapen":
            tensors[first] = tensors[first].flatten()[:-1]
        elif how == "extra":
            tensors["not.yours"] = torch.zeros(1)
        elif how == "half":
            tensors[first] = tensors[first].half()
        elif how == "nan loss":
            reply.content["metrics"]["train-loss"] = math.nan
        elif how == "impossible score":
            reply.content["metrics"].update({"loss": 1.0, "correct": 4, "heldout": 3})
        elif how == "empty score":
            reply.content["metrics"].update({"loss": 0.0, "correct": 0, "heldout": 0})
        elif how == "no metrics":
            reply.content["metrics"] = MetricRecord({})
        elif how == "no arrays":
            del reply.content["arrays"]
            return reply
        elif how == "stranger":
            reply.metadata.__dict__["_src_node_id"] = 99
        reply.content["arrays"] = ArrayRecord(tensors)
        return reply

    return spoil


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("nan", "not finite"),
        ("missing", "tensors missing"),
        ("misshapen", "is ("),
        ("extra", "not asked for: ['not.yours']"),
        ("half", "float16"),
        ("nan loss", "loss is nan"),
        ("impossible score", "an impossible score: 4 of 3"),
        ("empty score", "measurements are impossible"),
        ("no metrics", "slopes in the metrics is"),
        ("no arrays", "arrays are missing"),
        ("stranger", "it was not asked"),
    ],
)
def test_a_bad_reply_is_refused_and_counted_and_the_round_goes_on(
    how: str, reason: str, run_config: dict, tmp_path: Path
) -> None:
    broken, lost = Federation(tmp_path / "broken", run_config), Federation(tmp_path / "lost", run_config)
    broken.start(CLIENTS, rounds=1, tamper=breaking(how))
    lost.start(CLIENTS, rounds=1, tamper=breaking("lost"))
    line = broken.recorder.rounds[-1]
    assert (line.asked, line.answered, line.refused) == (CLIENTS, CLIENTS - 1, 1)
    assert reason in line.reasons[0]
    assert same(tensors_of(broken), tensors_of(lost))


@pytest.mark.parametrize("slopes", [[1.0], [1.0, math.inf, 1.0, 1.0], [1.0] * 6])
def test_bad_scalars_are_refused(slopes: list[float], run_config: dict, tmp_path: Path) -> None:
    def spoil(partition: int, reply: Message) -> Message:
        if partition == 0:
            reply.content["metrics"]["slopes"] = slopes
        return reply

    federation = Federation(tmp_path, run_config | {"method": "spry-per-iteration"})
    federation.start(CLIENTS, rounds=1, tamper=spoil)
    assert federation.recorder.rounds[-1].refused == 1


def test_a_unit_that_nobody_returned_stays_as_it_was_with_its_moments(run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config | {"head": "split", "server.min-available-nodes": 2})
    federation.start(CLIENTS, rounds=1)
    before = tensors_of(federation)
    lost: set[str] = set()

    def lose(partition: int, reply: Message) -> Message | None:
        if partition != 0:
            return reply
        lost.update(reply.content["arrays"])
        return None

    moments = {
        name: {key: value.clone() for key, value in federation.strategy.optimizer._optimizer.state[param].items()}
        for name, param in federation.strategy.optimizer._params.items()
    }
    federation.start(CLIENTS, rounds=1, tamper=lose)
    kept = lost - {name for task in list(federation.strategy.tasks.values())[1:] for name in asked(federation, task)}
    after = tensors_of(federation)
    assert kept
    for name in after:
        state = federation.strategy.optimizer._optimizer.state[federation.strategy.optimizer._params[name]]
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
        accepted.append((task, TrainReply(shuffled, (), 1.0, examples, 0.0)))
    mean = strategy.pseudo_gradient(accepted)
    assert set(mean) == set(strategy.units["head"]) | set(strategy.units[unit])
    for name in strategy.units["head"]:
        assert torch.allclose(mean[name], torch.full_like(mean[name], (1 * 1 + 2 * 2 + 5 * 3) / 8), atol=1e-6)
    for name in strategy.units[unit]:
        assert torch.allclose(mean[name], torch.full_like(mean[name], 2.0), atol=1e-6)


def test_a_client_starts_from_the_tensors_it_is_sent(run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config)
    far = {name: value + 5.0 for name, value in tensors_of(federation).items()}
    seen = {}

    def watch(partition: int, reply: Message) -> Message:
        seen[partition] = from_arrays(reply.content["arrays"])
        return reply

    for name, param in federation.strategy.optimizer._params.items():
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


def test_a_node_with_another_base_model_is_refused_by_name(run_config: dict, checkpoint: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    federation = Federation(tmp_path / "run", run_config | {"server.min-available-nodes": 2})
    from federation import LocalGrid

    grid = LocalGrid(CLIENTS, run_config)
    list(grid.contexts.values())[1].node_config["model"] = str(other)
    federation.strategy.start(grid, to_arrays(federation.strategy.snapshot()), num_rounds=1)
    assert federation.recorder.current.asked == CLIENTS - 1
    strict = Federation(tmp_path / "strict", run_config | {"server.min-available-nodes": 3})
    with pytest.raises(SpryError, match=r"2 of 3 connected nodes can be used(?s:.)*base model of this node"):
        strict.strategy.start(grid, to_arrays(strict.strategy.snapshot()), num_rounds=1)


def test_three_rounds_without_a_usable_reply_end_the_run(run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config | {"num-server-rounds": 9})
    with pytest.raises(SpryError, match="No usable reply in 3 rounds"):
        federation.start(CLIENTS, tamper=lambda partition, reply: None)


def test_bytes_are_those_of_the_messages_as_serialised(run_config: dict, tmp_path: Path) -> None:
    """Up: three replies of at least four bytes a number trained, with less than 4 KiB around them."""
    federation = Federation(tmp_path, run_config | {"server.fraction-evaluate": 0.0})
    federation.start(CLIENTS, rounds=1)
    numbers = sum(
        value.numel() for task in federation.strategy.tasks.values() for value in asked(federation, task).values()
    )
    up = federation.recorder.rounds[-1].mib_up * 2**20
    assert 4 * numbers < up < 4 * numbers + CLIENTS * 4096
