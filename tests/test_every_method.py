"""What every row of the method table must do: learn, give the same bits again, go on when replies fail."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, LocalGrid, same, tiny_run
from flwr.app import ArrayRecord, Message
from flwr.common.serde import recorddict_to_proto

from spry_app.methods import METHODS

CLIENTS = 3
OWN_KEYS: dict[str, dict[str, Any]] = {
    # One step a round, by the server, where the others take four on every client.
    "fedsgd": {"num-server-rounds": 40, "server.learning-rate": 0.3, "server.head-learning-rate": 0.0},
    "fwdllm": {"client.candidates": 8},
    "fedspzo": {"client.directions": 2, "client.upper-directions": 2},
}
SLOPES_A_DIRECTION = {"fedspzo": 4}
"""client.upper-directions of the upper half for each of the lower."""
OTHER_IDS = (5009, 5006, 5003)
"""Far from the usual node ids, and in the opposite order."""


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("method", METHODS)
def test_a_federation_learns(method: str, run_config: dict, tmp_path: Path) -> None:
    rounds = 10
    keys = {"client.local-steps": 4, "client.directions": 4, "client.directions-at-once": 4, "client.micro-batch": 0}
    keys |= {"num-server-rounds": rounds, "server.evaluate-every": rounds, "client.learning-rate": 0.1}
    federation = Federation(tmp_path, run_config | keys | {"method": method} | OWN_KEYS.get(method, {}))
    federation.start(CLIENTS)
    losses = [line.train_loss for line in federation.recorder.rounds[1:]]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert federation.recorder.rounds[-1].accuracy > 0.8


class Scale(LocalGrid):
    """Weighs what passes: bytes, numbers in tensors, and scalars, to the clients and from them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weighed = {"down": [0, 0, 0], "up": [0, 0, 0]}

    def send_and_receive(self, messages: Any, timeout: float | None = None) -> Any:
        messages = list(messages)
        replies = list(super().send_and_receive(messages, timeout))
        if messages and messages[0].metadata.message_type == "train":
            for way, found in (("down", messages), ("up", replies)):
                for message in found:
                    scalars = message.content.get("log" if way == "down" else "metrics", {}).get("slopes", [])
                    arrays = message.content["arrays"].to_torch_state_dict().values()
                    numbers = (recorddict_to_proto(message.content).ByteSize(), sum(a.numel() for a in arrays))
                    self.weighed[way] = [
                        a + b for a, b in zip(self.weighed[way], (*numbers, len(scalars)), strict=True)
                    ]
        return replies


@pytest.mark.parametrize("method", METHODS)
def test_what_travels_is_what_was_counted_by_hand(method: str, run_config: dict, tmp_path: Path) -> None:
    """Two rounds of two steps of two directions. Up: the numbers that a client trains, or the head and its scalars.

    Down: all numbers, or the head and, in the second round, the scalars of the first: one set a client, or one in all.
    """
    row, rounds = METHODS[method], 2
    federation = Federation(tmp_path, run_config | {"method": method, "server.fraction-evaluate": 0.0})
    grid = Scale(CLIENTS, federation.run_config)
    federation.run(grid, rounds)
    tensors, units = federation.strategy.snapshot(), federation.strategy.units
    size = {unit: sum(tensors[name].numel() for name in names) for unit, names in units.items()}
    hands = [hand for r in (1, 2) for hand in federation.strategy.assign([0.0] * CLIENTS, r)]
    scalars = 2 * 2 * SLOPES_A_DIRECTION.get(method, 1) if row.reply == "slopes" else 0
    trained = sum(size["head"] if scalars else sum(size[unit] for unit in hand) for hand in hands)
    logged = scalars * CLIENTS * (1 if row.seeds == "own" else 1 / CLIENTS) if row.send == "log" else 0
    sent = rounds * CLIENTS * (size["head"] if row.send == "log" else sum(size.values()))
    assert grid.weighed["up"][1:] == [trained, rounds * CLIENTS * scalars]
    assert grid.weighed["down"][1:] == [sent, CLIENTS * logged]
    line = federation.recorder.rounds[-1]
    assert [line.mib_down * 2**20, line.mib_up * 2**20] == [grid.weighed["down"][0], grid.weighed["up"][0]]


def failing(partition: int, reply: Message) -> Message | None:
    """In every round the reply of partition 0 is lost and that of partition 1 holds a number that is not finite."""
    if partition == 0:
        return None
    if partition == 1:
        tensors = reply.content["arrays"].to_torch_state_dict()
        reply.content["arrays"] = ArrayRecord({name: torch.full_like(t, math.nan) for name, t in tensors.items()})
    return reply


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits_though_a_reply_is_missing_and_one_is_broken(
    method: str, run_config: dict, tmp_path: Path
) -> None:
    keys = {"method": method, "adapter.dropout": 0.2, "num-server-rounds": 100, "server.evaluate-every": 100}
    results = []
    for run, node_ids in enumerate([(), OTHER_IDS]):
        federation = Federation(tmp_path / str(run), run_config | keys)
        before = federation.strategy.snapshot()
        federation.start(CLIENTS, rounds=2, node_ids=node_ids, tamper=failing)
        lines = federation.recorder.rounds[1:]
        assert [(line.asked, line.answered, line.refused) for line in lines] == [(CLIENTS, 1, 1)] * 2
        results.append(federation.strategy.snapshot())
        assert all(value.isfinite().all() for value in results[-1].values())
        assert not same(results[-1], before)
    assert same(*results)
