"""Hidden states kept during a client's task: the same training, fewer computations, within the bytes allowed."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prefix_rows import (
    ROWS,
    WIDTH,
    assert_same,
    config,
    hidden_states,
    made_in,
    node_of,
    rows_through_the_lowest,
    tokens,
)
from torch import Tensor, nn

from spry_app.autodiff.budget import Slices
from spry_app.client.node import Node, forget_nodes
from spry_app.client.training import train
from spry_app.config import RunConfig
from spry_app.methods import get_method
from spry_app.prefix import PrefixCache, may_start_at
from spry_app.protocol import Task, TrainReply

TOP = ("encoder.layer.1.attention.self.query", "head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_in(tmp_path_factory.mktemp("prefix"))


def run(config: RunConfig, units: tuple[str, ...] = TOP) -> TrainReply:
    node = node_of(config)
    task = Task(
        1, 0, start(node.adapted.tensors()), units, node.adapted.fingerprint, directions=config.client.directions
    )
    return train(node, task, get_method(config), config, Slices(4, config.client.directions_at_once))


def start(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same at every call: a node is loaded once a process, and keeps what was loaded into it."""
    return {name: 0.2 * torch.sin(torch.arange(value.numel()).view_as(value)) for name, value in tensors.items()}


@pytest.fixture
def rows_through_the_lowest_block(folder: Path) -> Iterator[list[int]]:
    with rows_through_the_lowest(node_of(config(folder))) as seen:
        yield seen


@pytest.mark.parametrize(
    "gradient", ["forward-mode", "central-difference", "backprop", "checkpointed-backprop", "bisected-backprop"]
)
def test_training_is_the_same_and_each_row_passes_the_prefix_once(
    folder: Path, rows_through_the_lowest_block: list[int], gradient: str
) -> None:
    kept = run(config(folder, gradient=gradient))
    assert sum(rows_through_the_lowest_block) == ROWS
    rows_through_the_lowest_block.clear()
    anew = run(config(folder, gradient=gradient, client__prefix_cache_mib=0))
    assert sum(rows_through_the_lowest_block) >= 2 * ROWS
    assert kept.loss == pytest.approx(anew.loss, rel=1e-5)
    for name, value in anew.tensors.items():
        torch.testing.assert_close(kept.tensors[name], value, rtol=1e-4, atol=1e-6)


def test_what_no_client_trains_is_passed_once_in_all_tasks(folder: Path) -> None:
    """LoRA in the upper of two blocks: the second task begins above the lower one, dropout or not."""
    replies, rows = {}, dict[int, list[int]]()
    for mib in (64, 0):
        settings = config(
            folder, client__prefix_cache_mib=mib, adapter__targets="1.attention.self.value", adapter__dropout=0.3
        )
        node = node_of(settings)
        assert all(may_start_at(node.adapted, node.train, depth) for depth in (1, 2))
        seen = rows[mib] = []
        lowest = node.adapted.model.get_submodule(node.adapted.blocks[0]).get_submodule("attention.self.query")
        hook = lowest.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(len(output)))
        replies[mib] = [run(settings, ("encoder.layer.1.attention.self.value", "head")) for _ in range(2)]
        hook.remove()
    forget_nodes()
    assert sum(rows[64]) == ROWS < sum(rows[0])
    first, second = replies[64]
    assert first.forwards - second.forwards == pytest.approx(ROWS / 2)
    for kept, anew in zip(replies[64], replies[0], strict=True):
        assert kept.loss == pytest.approx(anew.loss, rel=1e-5)
        for name, value in anew.tensors.items():
            torch.testing.assert_close(kept.tensors[name], value, rtol=1e-4, atol=1e-6)


def test_the_head_alone_needs_no_block_twice(folder: Path, rows_through_the_lowest_block: list[int]) -> None:
    settings = config(folder, client__local_epochs=3)
    node = node_of(settings)
    assert node.adapted.depth(node.adapted.units["head"]) == 2
    run(settings, ("head",))
    assert sum(rows_through_the_lowest_block) == ROWS


def test_units_of_the_lowest_block_and_dropout_leave_nothing_to_keep(
    folder: Path, rows_through_the_lowest_block: list[int]
) -> None:
    run(config(folder, client__local_epochs=1), ("encoder.layer.0.attention.self.value", "head"))
    assert sum(rows_through_the_lowest_block) == 2 * ROWS  # two pairs of directions


def test_dropout_in_the_adapter_is_drawn_anew_in_every_step(folder: Path) -> None:
    settings = config(folder, adapter__dropout=0.5)
    node = node_of(settings)
    assert may_start_at(node.adapted, node.train, 2)
    seen: list[int] = []
    lowest = node.adapted.model.get_submodule(node.adapted.blocks[0]).get_submodule("attention.self.query")
    hook = lowest.register_forward_hook(lambda *_: seen.append(1))
    run(settings)
    hook.remove()
    assert len(seen) == 2 * 3 * 2 * 2  # epochs, batches, micro-batches, passes


def cache(folder: Path, memory: int, disk: int = 0) -> tuple[Node, PrefixCache]:
    node = node_of(config(folder))
    return node, PrefixCache(node.adapted, node.train, 1, memory, disk)


def test_rows_kept_in_other_batches_are_put_together_and_padded_again(folder: Path) -> None:
    node, kept = cache(folder, 1 << 20)
    order = node.train.by_length(range(ROWS))
    short, long = order[:2], order[-2:]
    assert tokens(node, short) < tokens(node, long)
    kept.entering([short, long])
    for rows in ([short[0], long[1]], [short[1], order[5], long[0]]):
        (found,) = kept.entering([rows])
        assert found is not None
        expected = hidden_states(node, rows)
        assert_same(node, rows, found.hidden, expected)


@pytest.mark.parametrize("disk", [0, 1 << 20])
def test_memory_is_bounded_and_the_rest_goes_to_disk_or_is_computed_again(
    folder: Path, disk: int, rows_through_the_lowest_block: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    node = node_of(config(folder))
    rows = list(range(4))
    batch = hidden_states(node, rows).nbytes
    node, kept = cache(folder, memory=batch + 2 * 8 * WIDTH, disk=disk)  # beside the batch, two rows or so
    (first,) = kept.entering([rows])
    rows_through_the_lowest_block.clear()
    (second,) = kept.entering([rows])
    assert first is not None and second is not None
    assert_same(node, rows, first.hidden, second.hidden)
    files = list(tmp_path.rglob("*.safetensors"))
    assert 0 < sum(rows_through_the_lowest_block) < 4 if not disk else not rows_through_the_lowest_block
    assert bool(files) == bool(disk) and len(files) < 4
    kept.close()
    assert not list(tmp_path.iterdir())


def test_a_batch_that_does_not_fit_begins_at_the_bottom(folder: Path) -> None:
    _, kept = cache(folder, memory=3 * 8 * WIDTH)
    found = kept.entering([[0, 1], [2, 3], [4, 5]])
    assert found[0] is not None
    assert found[-1] is None


def test_padding_on_the_left_keeps_nothing_but_shares_the_step(
    folder: Path, rows_through_the_lowest_block: list[int]
) -> None:
    node = node_of(config(folder))
    left = dataclasses.replace(node.train, tokenizer=type(node.train.tokenizer).from_pretrained(folder / "model"))
    left.tokenizer.padding_side = "left"
    kept = PrefixCache(node.adapted, left, 1, 1 << 20)
    for _ in range(2):
        (found,) = kept.entering([[0, 1, 2]])
        assert found is not None
        torch.testing.assert_close(found.hidden, node.adapted.prefix(left.batch([0, 1, 2]), 1).hidden)
    assert sum(rows_through_the_lowest_block) == 4 * 3


def test_a_model_whose_upper_part_sees_more_than_the_hidden_states_starts_at_the_bottom(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = node_of(config(folder, seed=5))
    lower, upper = (node.adapted.model.get_submodule(name) for name in node.adapted.blocks)
    memory: list[Tensor] = []

    def remember(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        memory[:] = [output]

    fresh = node.adapted.model.register_forward_pre_hook(lambda *_: memory.clear())
    # As in models whose layers have side connections: the first token is sent past the blocks between.
    first = lower.attention.register_forward_hook(lambda m, i, output: remember(m, i, output[0]))
    second = upper.attention.register_forward_hook(
        lambda m, i, output: (output[0] + (memory.pop() if memory else 0), *output[1:])
    )
    assert not may_start_at(node.adapted, node.train, 1)
    assert "begin at the bottom" in caplog.text
    first.remove()
    second.remove()
    fresh.remove()
