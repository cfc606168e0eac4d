"""A federation of boxes that state different memory, dealt by depth: who holds what, and that it trains."""

import math
from pathlib import Path
from typing import Any

import pytest
from federation import Federation, same, tiny_run
from flwr.app import Message

from spry_app.client.node import load_node
from spry_app.config import RunConfig
from spry_app.errors import SpryError

BOXES = ({"memory-budget-mib": 64.0}, {"memory-budget-mib": 8}, {"memory-budget-mib": 4000})
MEMORY_MIB = [64.0, 8.0, 4000.0]
LOWER = ("encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.value")
UPPER = ("encoder.layer.1.attention.self.query", "encoder.layer.1.attention.self.value")


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_run(tmp_path_factory.mktemp("tiny")) | {"assign": "by-depth"}


@pytest.mark.slow
def test_the_weakest_box_always_holds_the_top_while_the_federation_learns(run_config: dict, tmp_path: Path) -> None:
    """The head is dealt too: of 64, 64, 64, 64 and 66 values, 128 + 128 + 66 is the most even cut into three bands."""
    keys = {"head": "split", "client.local-steps": 4, "client.directions": 4, "client.learning-rate": 0.2}
    keys |= {
        "num-server-rounds": 4,
        "server.evaluate-every": 4,
        "client.directions-at-once": 4,
        "client.micro-batch": 0,
    }
    results = []
    for run, node_ids in enumerate([(), (5009, 5006, 5003)]):
        federation = Federation(tmp_path / str(run), run_config | keys)
        held: list[tuple[int, int, tuple[str, ...]]] = []

        def watch(partition: int, reply: Message, federation: Federation = federation, held: list = held) -> Message:
            task = federation.strategy.tasks[reply.metadata.src_node_id]
            held.append((task.round, partition, task.units))
            return reply

        federation.start(3, tamper=watch, own=BOXES, node_ids=node_ids)
        hands = [(0, UPPER), (1, ("head",)), (2, LOWER)]
        assert sorted(held) == [(round_, *hand) for round_ in range(1, 5) for hand in hands]
        losses = [line.train_loss for line in federation.recorder.rounds[1:]]
        assert sum(losses[-2:]) < 0.75 * sum(losses[:2])
        results.append(federation.strategy.snapshot())
    assert same(*results)


def test_a_shared_head_goes_to_everyone_beside_the_band(run_config: dict, tmp_path: Path) -> None:
    strategy = Federation(tmp_path, run_config).strategy
    assert strategy.assign(MEMORY_MIB, 1) == [[UPPER[0], "head"], [UPPER[1], "head"], [*LOWER, "head"]]


@pytest.mark.parametrize("stated", ["64MB", "64", 0, -1.0, True, math.nan, math.inf])
def test_a_memory_that_is_no_positive_number_is_refused_in_words(stated: Any) -> None:
    with pytest.raises(SpryError, match="it must be a positive number of MiB"):
        load_node(RunConfig(), {"partition-id": 0, "num-partitions": 1, "memory-budget-mib": stated})
