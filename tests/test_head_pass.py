"""The head's exact gradient from the passes of the slopes: the same numbers as from a pass of its own, and no more."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import tiny_run
from tiny_checkpoints import MAPS, shaken, write_checkpoint
from torch import nn

from spry_app.autodiff.directions import Seed, Tensors
from spry_app.autodiff.exact import estimate_with_exact
from spry_app.autodiff.gradients import GRADIENTS, Estimate
from spry_app.autodiff.memory import peak_mib
from spry_app.autodiff.slopes import Batch, Part
from spry_app.client.node import Node, load_node
from spry_app.config import RunConfig
from spry_app.objectives import batch_of, head_cut

FORWARD = GRADIENTS["forward-mode"]
SEED = Seed(1, 2, 3, 4)
K, ROWS, MICRO_BATCH = 3, 6, 4
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "above the blocks too": {"targets": "query,pooler.dense"},
    "shared, above the blocks too": {**MAPS["shared"], "targets": "query,pooler.dense"},
    "bitfit": {"kind": "bitfit"},
    "dropout": {"dropout": 0.5},
} | {name: MAPS[name] for name in ("core", "random")}


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_run(tmp_path_factory.mktemp("tiny"))


def _node(run_config: dict[str, Any], **adapter: Any) -> Node:
    keys = run_config | {f"adapter.{key}": value for key, value in adapter.items()}
    return load_node(RunConfig.from_flower(keys), {"partition-id": 0, "num-partitions": 1})


def _tensors(node: Node) -> Tensors:
    return shaken(node.adapted.tensors(), 0.1)


def _estimate(node: Node, batch: Batch, cut: int | None, at_once: int = 1) -> Estimate:
    head = node.adapted.units["head"]
    return estimate_with_exact(FORWARD, batch, _tensors(node), head, SEED, K, at_once, cut)


def _batch(node: Node) -> list[Part]:
    return batch_of(node.adapted, node.train, range(ROWS), MICRO_BATCH, SEED)


def _joined(part: Part, cut: int) -> Part:
    """The halves as one objective: what the whole one is, but for the masks of dropout."""
    assert part.halves is not None
    halves = part.halves(cut)
    return Part(lambda params: halves.upper(params, halves.lower(params)), part.weight)


def _assert_close(one: Estimate, other: Estimate) -> None:
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert one.slopes == pytest.approx(other.slopes, rel=1e-3, abs=1e-5)
    assert list(one.gradient) == list(other.gradient)
    for name, gradient in one.gradient.items():
        torch.testing.assert_close(gradient, other.gradient[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [1, 2, K])
def test_the_passes_of_the_slopes_give_the_head_its_gradient(
    run_config: dict[str, Any], kind: str, at_once: int
) -> None:
    node = _node(run_config, **KINDS[kind])
    batch, head = _batch(node), node.adapted.units["head"]
    cut = head_cut(FORWARD, node.adapted, node.train, head, _tensors(node))
    assert cut == len(node.adapted.blocks)
    found = _estimate(node, batch, cut, at_once)
    assert all(found.gradient[name].abs().max() > 1e-4 for name in head) and min(map(abs, found.slopes)) > 1e-6
    _assert_close(found, _estimate(node, [_joined(part, cut) for part in batch], None, at_once))
    if kind != "dropout":
        _assert_close(found, _estimate(node, batch, None, at_once))


@pytest.mark.parametrize(("at_once", "passes"), [(1, 3), (2, 2), (3, 1)])
def test_the_blocks_run_for_the_slopes_alone(run_config: dict[str, Any], at_once: int, passes: int) -> None:
    """And the cost says so; with a pass of its own there is one more."""
    node = _node(run_config)
    batch, cut, seen = _batch(node), len(node.adapted.blocks), [0]
    blocks = [node.adapted.model.get_submodule(name) for name in node.adapted.blocks]
    inside = [next(part for part in block.modules() if type(part) is nn.Linear) for block in blocks]
    hooks = [part.register_forward_hook(lambda *_: seen.append(seen.pop() + 1)) for part in inside]
    for where, more in ((cut, 0), (None, 1)):
        seen[0] = 0
        estimate = _estimate(node, batch, where, at_once)
        assert seen[0] == len(batch) * len(blocks) * (passes + more)
        assert estimate.cost.forwards(1.0) == passes + more + K
    for hook in hooks:
        hook.remove()


def test_a_step_is_cut_only_where_that_gives_something(run_config: dict[str, Any], tmp_path: Path) -> None:
    node = _node(run_config, targets="query,pooler.dense")
    adapted, head = node.adapted, node.adapted.units["head"]
    names = list(adapted.tensors())
    pooler = [name for name in names if "pooler" in name]
    assert pooler
    assert head_cut(FORWARD, adapted, node.train, head, names) == 2
    assert head_cut(GRADIENTS["central-difference"], adapted, node.train, head, names) is None  # not at the tensors
    assert head_cut(FORWARD, adapted, node.train, (), names) is None
    assert head_cut(FORWARD, adapted, node.train, head, head) is None
    assert head_cut(FORWARD, adapted, node.train, head, [*pooler, *head]) is None  # no slope comes from below the cut


@pytest.mark.parametrize("family", ["albert", "deberta-v2"])
def test_a_model_that_cannot_be_cut_has_a_pass_for_its_head(
    family: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    node = _node(run_config | {"model.name": write_checkpoint(tmp_path, family)})
    assert head_cut(FORWARD, node.adapted, node.train, node.adapted.units["head"], node.adapted.tensors()) is None


def test_a_head_of_the_same_passes_takes_no_more_memory(run_config: dict[str, Any]) -> None:
    node = _node(run_config)
    batch, cut = batch_of(node.adapted, node.train, range(64), 0, SEED), len(node.adapted.blocks)
    for at_once in (1, K):
        together, apart = (peak_mib(partial(_estimate, node, batch, where, at_once), "cpu") for where in (cut, None))
        assert together < 1.1 * apart


def test_a_large_head_takes_as_much_for_many_micro_batches_as_for_one(run_config: dict[str, Any]) -> None:
    """2,000 classes: 0.25 MiB of exact gradients for each micro-batch, of which no two are kept."""
    node = _node(run_config | {"data.num-labels": 2000})
    head = sum(node.start[name].nbytes for name in node.adapted.units["head"]) / 2**20
    assert head > 0.2
    one, many = (
        peak_mib(
            partial(_estimate, node, batch_of(node.adapted, node.train, [0] * rows, 1, SEED), len(node.adapted.blocks)),
            "cpu",
        )
        for rows in (1, 4)
    )
    assert many < one + head / 2
