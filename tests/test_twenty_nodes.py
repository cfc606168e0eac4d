"""Twenty SuperNode processes with a worker each, as on twenty boxes, on loopback with a tiny model."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from drills import plain
from ground import Ground

from spry_app.worker.ask import health

NODES = 20


@pytest.fixture
def crowd() -> Iterator[Ground]:
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))  # short: a socket's path is
    with plain(folder, [f"node-{index}" for index in range(NODES)]) as ground:
        yield ground
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.skipif("SPRY_LOAD" not in os.environ, reason="takes 10 GiB and many minutes: set SPRY_LOAD=1")
def test_twenty_nodes_train_one_model_with_warm_workers(crowd: Ground) -> None:
    run = crowd.submit(
        **{
            "num-server-rounds": 3,
            "server.min-available-nodes": NODES,
            "server.wait-timeout-s": 500.0,
            "server.round-timeout-s": 500.0,
            "client.local-steps": 2,
        }
    )
    run.until_round(1, timeout_s=900.0)
    workers = [health(node.worker) for node in crowd.nodes.values()]
    run.completed()
    assert [(line["asked"], line["answered"], line["reasons"]) for line in run.rounds[1:]] == [(NODES, NODES, [])] * 3
    assert len({worker["pid"] for worker in workers if worker}) == NODES
    after = [health(node.worker) for node in crowd.nodes.values()]
    assert [worker and (worker["pid"], worker["loads"]) for worker in after] == [
        worker and (worker["pid"], 1) for worker in workers
    ]
    losses = [line["loss"] for line in run.rounds if line["loss"] is not None]
    assert losses[-1] < losses[0]
