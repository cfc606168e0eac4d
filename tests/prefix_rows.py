"""A tiny model with rows of unequal length, of which hidden states are kept, and who passed its lowest block."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from federation import make_checkpoint, make_rows
from torch import Tensor, nn

from spry_app.client.node import Node, load_node
from spry_app.config import RunConfig
from spry_app.prefix import may_start_at

ROWS = 24
WIDTH = 32 * 4
"""Bytes of a token's hidden state in the tiny checkpoint."""


def made_in(folder: Path) -> Path:
    """The folder, with its model and its rows."""
    make_rows(folder / "rows.jsonl", ROWS)
    make_checkpoint(folder / "model")
    return folder


def config(folder: Path, **keys: Any) -> RunConfig:
    flat = RunConfig.defaults() | {
        "model.name": str(folder / "model"),
        "data.source": str(folder / "rows.jsonl"),
        "data.partition": "iid",
        "data.holdout": 0.0,
        "method": "spry",
        "client.batch-size": 8,
        "client.local-epochs": 2,
        "client.directions": 4,
        "client.directions-at-once": 2,
    }
    return RunConfig.from_flower(
        flat | {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    )


def node_of(config: RunConfig) -> Node:
    return load_node(config, {"partition-id": 0, "num-partitions": 1})


@contextmanager
def rows_through_the_lowest(node: Node) -> Iterator[list[int]]:
    """Rows of each time that the lowest block is computed meanwhile."""
    adapted = node.adapted
    assert all(may_start_at(adapted, node.train, depth) for depth in (1, 2))  # tries it, once a process
    lowest = next(part for part in adapted.model.get_submodule(adapted.blocks[0]).modules() if type(part) is nn.Linear)
    seen: list[int] = []
    hook = lowest.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    yield seen
    hook.remove()


def tokens(node: Node, rows: list[int]) -> int:
    return sum(len(node.train.features["input_ids"][row]) for row in rows)


def assert_same(node: Node, rows: list[int], found: Tensor, expected: Tensor) -> None:
    """But for what the padding holds, which nobody sees."""
    assert found.shape == expected.shape
    for row, got, wanted in zip(rows, found, expected, strict=True):
        length = tokens(node, [row])
        torch.testing.assert_close(got[:length], wanted[:length], rtol=1e-4, atol=1e-5)


def hidden_states(node: Node, rows: list[int]) -> Tensor:
    return node.adapted.prefix(node.train.batch(rows), 1).hidden
