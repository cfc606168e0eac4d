"""Scalars both ways: a client that follows the slope log holds the server's bits, whatever it has missed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, LocalGrid, same, tiny_run
from flwr.app import Message

from spry_app.autodiff.directions import Seed, direction
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import METHODS, get_method
from spry_app.methods.global_state import merged
from spry_app.protocol import Task, from_arrays
from spry_app.server.downlink import Log
from spry_app.slope_log import Entry, Measured

CLIENTS = 3
ROUNDS = 5
LOGGED = [name for name, method in METHODS.items() if method.send == "log"]


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    keys = {"server.fraction-evaluate": 0.0, "num-server-rounds": 100, "server.evaluate-every": 100}
    return tiny_run(tmp_path_factory.mktemp("tiny")) | keys


def away(partition: int, reply: Message) -> Message | None:
    """Loses what partition 0 answers in rounds 2 and 3."""
    return None if partition == 0 and reply.metadata.group_id in ("2", "3") else reply


@pytest.mark.parametrize("head_gradient", ["exact", "forward"])
@pytest.mark.parametrize("method", LOGGED)
def test_the_log_and_the_weights_give_the_same_run_to_the_bit(
    method: str, head_gradient: str, run_config: dict, tmp_path: Path
) -> None:
    """Though a client is away for two rounds; and with the log far fewer bytes go down."""
    results, sizes = [], []
    for send in ("weights", "log"):
        keys = {"method": method, "send": send, "head-gradient": head_gradient, "num-server-rounds": 100}
        federation = Federation(tmp_path / send, run_config | keys)
        federation.start(CLIENTS, rounds=ROUNDS, tamper=away)
        assert [line.answered for line in federation.recorder.rounds[1:]] == [3, 2, 2, 3, 3]
        assert not any(line.refused for line in federation.recorder.rounds)
        results.append(federation.strategy.snapshot())
        sizes.append(federation.recorder.rounds[-1].mib_down)
    assert same(*results)
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("optimizer", ["average", "sgd", "momentum", "adagrad", "adam", "yogi"])
def test_a_client_that_missed_rounds_ends_bit_equal_to_one_that_did_not(
    optimizer: str, run_config: dict, tmp_path: Path
) -> None:
    """Whatever the server's optimizer remembers; each client is compared with the server as it was before the round."""
    federation = Federation(
        tmp_path, run_config | {"method": "spry-per-iteration", "server.optimizer": optimizer, "client.local-steps": 1}
    )
    before = []

    def watch(partition: int, reply: Message) -> Message | None:
        if partition == 0:  # the state does not change while replies come in
            before.append(federation.strategy.snapshot())
        return away(partition, reply)

    grid = federation.start(CLIENTS, rounds=ROUNDS, tamper=watch)
    held = [from_arrays(context.state["tensors"]) for context in grid.contexts.values()]
    assert len(before) == ROUNDS
    assert all(same(tensors, before[-1]) for tensors in held)
    assert not same(before[-1], before[0])


def test_clients_that_are_asked_now_and_then_follow_too(run_config: dict, tmp_path: Path) -> None:
    """Two of five a round, drawn anew; the others score the global model, which the log tells them as well."""
    results = []
    for send in ("weights", "log"):
        some = {"server.fraction-train": 0.4, "server.fraction-evaluate": 0.6, "server.evaluate-every": 2}
        keys = {"method": "spry-per-iteration", "send": send, "num-server-rounds": 6}
        federation = Federation(tmp_path / send, run_config | keys | some)
        federation.start(5)
        lines = federation.recorder.rounds[1:]
        assert [(line.answered, line.refused) for line in lines] == [(2, 0)] * 6
        results.append((federation.strategy.snapshot(), [(line.loss, line.accuracy) for line in lines]))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[0][1][1][0] is not None


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda state: state.clear(), "holds those of the start; the slope log begins after round 1"),
        (lambda state: state["tensors"].clear(), "are not the server's"),
    ],
)
def test_a_client_that_forgot_or_drifted_costs_one_reply_and_is_sent_every_tensor(
    spoil: Any, sentence: str, run_config: dict, tmp_path: Path
) -> None:
    """It fails between rounds 2 and 3, is told by the digest, and follows the log again from round 5 on."""
    federation = Federation(tmp_path, run_config | {"method": "spry-per-iteration"})
    full = federation.strategy.snapshot()
    sent: dict[int, int] = {}

    class Grid(LocalGrid):
        def send_and_receive(self, messages: Any, timeout: float | None = None) -> Any:
            messages = list(messages)
            if messages and messages[0].metadata.group_id == "3":
                spoil(self.contexts[100].state)
            for message in messages:
                if message.metadata.dst_node_id == 100 and message.metadata.message_type == "train":
                    sent[int(message.metadata.group_id)] = len(message.content["arrays"])
            return super().send_and_receive(messages, timeout)

    grid = Grid(CLIENTS, federation.run_config)
    federation.run(grid, ROUNDS)
    lines = federation.recorder.rounds[1:]
    assert [(line.answered, line.refused) for line in lines] == [(3, 0), (3, 0), (2, 1), (3, 0), (3, 0)]
    assert sentence in lines[2].reasons[0]
    head = len(federation.strategy.units["head"])
    assert sent == {1: head, 2: head, 3: head, 4: len(full), 5: head}


def entry(round_: int, slopes: int) -> Entry:
    return Entry(round_, (Measured(0, (0,), 8, ((0.5,) * slopes,)),))


def test_every_tensor_travels_where_the_log_is_longer(run_config: dict, tmp_path: Path) -> None:
    """By hand: N numbers of four bytes against slopes of eight; the head travels either way, so it counts for none."""
    federation = Federation(tmp_path, run_config | {"method": "baffle", "send": "log"})
    strategy = federation.strategy
    numbers = sum(value.numel() for name, value in strategy.snapshot().items() if name not in strategy.state.exact)
    downlink = Log(strategy.state)
    task = Task(1, 0, strategy.snapshot(), (), "")
    assert downlink.outgoing(7, task).catch_up.moments == {}  # nothing is known of it yet
    for node, digest in ((8, strategy.state.digest()), (9, "another start")):
        downlink.met(node, digest)
    assert downlink.outgoing(8, task).tensors.keys() == strategy.state.exact
    assert downlink.outgoing(9, task).tensors.keys() == task.tensors.keys()
    downlink.append(entry(1, numbers // 4))
    downlink.append(entry(2, numbers // 4 - 1))
    assert [line.round for line in downlink.outgoing(8, task).catch_up.entries] == [1, 2]
    downlink.append(entry(3, 1))
    assert downlink.outgoing(8, task).tensors.keys() == task.tensors.keys()
    for _ in range(2):
        downlink.lost(8)
    downlink.outgoing(8, task)
    downlink.followed(8)
    assert downlink.outgoing(8, task).tensors.keys() == task.tensors.keys()  # it has failed too often


def test_decomfl_moves_along_the_shared_directions_by_the_mean_slope(run_config: dict, tmp_path: Path) -> None:
    """By hand: w - rate * sum over steps of the mean over directions and clients (8 examples each) of slope * z."""
    keys = {"method": "decomfl", "head-gradient": "forward", "client.local-steps": 3, "client.learning-rate": 0.02}
    federation = Federation(tmp_path, run_config | keys)
    before, sent = federation.strategy.snapshot(), {}

    def watch(partition: int, reply: Message) -> Message:
        sent[partition] = torch.tensor(reply.content["metrics"]["slopes"], dtype=torch.float64).view(3, 2)
        assert not reply.content["arrays"]
        return reply

    federation.start(CLIENTS, rounds=1, tamper=watch)
    mean = sum(sent.values()) / CLIENTS
    after = federation.strategy.snapshot()
    for name, value in before.items():
        for step in range(3):
            seed = Seed(run=federation.config.seed, round=1, client=0, step=step)
            for k in range(2):
                value = value - 0.02 * mean[step, k] / 2 * direction(seed, k, before)[name]
        torch.testing.assert_close(after[name], value.float(), rtol=1e-5, atol=1e-7)
    assert len({tuple(slopes.flatten().tolist()) for slopes in sent.values()}) == CLIENTS  # of rows of their own


def test_slopes_along_the_same_directions_are_averaged_by_examples() -> None:
    replies = [
        Measured(0, (0, 1), 1, ((1.0, 2.0), (3.0, 4.0))),
        Measured(0, (0,), 5, ((9.0, 9.0), (9.0, 9.0))),
        Measured(0, (0, 1), 3, ((5.0, 6.0), (7.0, 8.0))),
    ]
    assert merged(replies) == (Measured(0, (0, 1), 4, ((4.0, 5.0), (6.0, 7.0))), replies[1])


def test_shared_directions_need_steps_that_are_linear_in_the_slopes() -> None:
    with pytest.raises(SpryError, match=r"client\.optimizer='adam': method='decomfl'"):
        get_method(RunConfig.from_flower({"method": "decomfl", "client.optimizer": "adam"}))
    with pytest.raises(SpryError, match=r'send=\'log\'.*needs reply="slopes"'):
        get_method(RunConfig.from_flower({"method": "fedavg", "send": "log"}))
