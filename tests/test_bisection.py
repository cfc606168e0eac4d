"""Bisected backpropagation: the gradient of backprop, few hidden states at a time, and refused where it would lie."""

import math
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from federation import make_checkpoint, make_rows
from test_blocks import adapted_tiny
from tiny_models import tiny_batch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

from spry_app.autodiff.bisection import Chain, WayBack
from spry_app.autodiff.directions import Seed, Tensors
from spry_app.autodiff.gradients import GRADIENTS, Estimate
from spry_app.autodiff.memory import peak_mib
from spry_app.autodiff.slopes import Part
from spry_app.client import trust
from spry_app.client.node import Node, forget_nodes, load_node
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.models import AdaptedModel
from spry_app.objectives import batch_of, chain, objective

SEED = Seed(0, 0, 0, 3)
BISECTED = "bisected-backprop"


class Rows(SimpleNamespace):
    """A tiny batch, as far as an objective asks of rows."""

    def __init__(self) -> None:
        batch = tiny_batch()
        super().__init__(labels=batch.pop("labels"), batch=batch, task=self)

    def inputs(self, _: Sequence[int]) -> dict[str, Tensor]:
        return self.batch

    def aims(self, _: Sequence[int]) -> Tensor:
        return self.labels

    def loss(self, model: Any, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return cross_entropy(model.logits(inputs).double(), targets)


def part_of(adapted: AdaptedModel) -> Part:
    rows: Any = Rows()
    by_block = partial(chain, adapted, rows, [0], SEED, None)
    return Part(objective(adapted, rows, [0], SEED), 1.0, chain=by_block)


def estimate(name: str, part: Part, params: Tensors) -> Estimate:
    return GRADIENTS[name].estimate([part], params, SEED, 1, 1)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama", "opt"])
@pytest.mark.parametrize("lowest", [0, 1, 2])
def test_the_gradient_is_that_of_backprop_with_dropout_too(family: str, lowest: int) -> None:
    """Of all tensors, of those from the upper block on, and of the head alone; LoRA drops 0.3 of its inputs."""
    adapted, params = adapted_tiny(family)
    own = {name: value for name, value in params.items() if adapted.depth([name]) >= lowest}
    part = part_of(adapted)
    expected, found = (estimate(name, part, own) for name in ("backprop", BISECTED))
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    for name, value in expected.gradient.items():
        torch.testing.assert_close(found.gradient[name], value, rtol=1e-5, atol=1e-7)
        assert value.count_nonzero() or "lora" not in name


def numbers(blocks: int) -> tuple[Chain, Tensors, list[int]]:
    """h -> sin(h + w_b) in block b, a loss of its square. The list: hidden states alive after each that was made."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    seen: list[int] = []

    def through(params: Tensors, low: int, high: int, hidden: Tensor | None) -> Tensor:
        h = torch.full((4,), 0.3, dtype=torch.float64) if hidden is None else hidden
        for block in range(low, high):
            h = torch.sin(h + params[f"w{block}"])
        if not torch.is_grad_enabled():
            alive.add(h.untyped_storage())
            seen.append(len(alive))
        return h

    params = {f"w{block}": torch.tensor(0.1 * block, dtype=torch.float64) for block in range(blocks)}
    return Chain(range(blocks), None, through, lambda p, h: h.square().sum()), params, seen


def passed_again(stages: int) -> int:
    """By hand: half of the stages are passed to reach the middle, then each half is a problem of its own."""
    return 0 if stages == 1 else stages // 2 + passed_again(stages // 2) + passed_again(stages - stages // 2)


@pytest.mark.parametrize("blocks", [1, 2, 3, 6, 24, 33])
def test_a_logarithm_of_the_blocks_is_kept_and_the_others_are_passed_again(blocks: int) -> None:
    whole, params, seen = numbers(blocks)
    total = {name: torch.zeros(()) for name in params}
    way = WayBack(whole, params, total, weight=0.5)
    loss = way.loss()
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    expected = whole.end(leaves, whole.through(leaves, 0, blocks, None))
    assert loss == expected.detach()
    for name, grad in zip(leaves, torch.autograd.grad(expected, list(leaves.values())), strict=True):
        torch.testing.assert_close(total[name], 0.5 * grad.float())
    assert max(seen) <= math.ceil(math.log2(blocks + 1))
    assert way.again == passed_again(blocks + 1)
    assert way.again <= blocks * (math.log2(blocks + 1) / 2 + 0.5)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Sixteen blocks, so that what is kept of each counts."""
    folder = tmp_path_factory.mktemp("deep")
    make_checkpoint(folder)
    shape = BertConfig.from_pretrained(folder, num_hidden_layers=16)
    BertForSequenceClassification(shape).save_pretrained(folder)
    flat = {"model.name": str(folder), "data.source": str(make_rows(folder / "rows.jsonl", 32))}
    return RunConfig.from_flower(RunConfig.defaults() | flat | {"data.partition": "iid", "data.holdout": 0.0})


def node_of(config: RunConfig) -> Node:
    forget_nodes()
    return load_node(config, {"partition-id": 0, "num-partitions": 1})


def test_it_takes_less_memory_than_checkpoints_of_every_block(deep: RunConfig) -> None:
    node = node_of(deep)
    batch, tensors = batch_of(node.adapted, node.train, range(32), 0, SEED), node.adapted.tensors()
    found = {name: GRADIENTS[name].estimate(batch, tensors, SEED, 1) for name in ("backprop", BISECTED)}
    for name, value in found["backprop"].gradient.items():
        torch.testing.assert_close(found[BISECTED].gradient[name], value, rtol=1e-3, atol=1e-6)
    hidden = batch[0].halves(8).lower(tensors).nbytes / 2**20  # type: ignore[misc]
    every, few = (
        peak_mib(lambda name=name: GRADIENTS[name].estimate(batch, tensors, SEED, 1), "cpu")
        for name in ("checkpointed-backprop", BISECTED)
    )
    assert every - few > 8 * hidden  # of sixteen states five are kept, and beside them a gradient
    assert found[BISECTED].cost.forwards(1.0) == 1 + 1 + passed_again(17) / 16


def test_a_node_tries_it_before_it_is_trusted(deep: RunConfig) -> None:
    node = node_of(deep)
    trust.check_gradient(node, GRADIENTS[BISECTED], at_once=1)
    assert BISECTED not in trust.trusted(node, GRADIENTS["forward-mode"], 1)  # nobody may ask for it
    assert BISECTED in trust.trusted(node, GRADIENTS["forward-mode"], 1, every=True)
    assert BISECTED in trust.trusted(node, GRADIENTS[BISECTED], 1)


def shallow(folder: Path, **keys: str) -> RunConfig:
    """Two blocks of weights that are far from small."""
    checkpoint, rows = make_checkpoint(folder / "model"), make_rows(folder / "rows.jsonl", 8)
    own = {"model.name": str(checkpoint), "data.source": str(rows), "data.partition": "iid"}
    return RunConfig.from_flower(RunConfig.defaults() | own | keys)


class Leaping(nn.Module):
    """A pooler that also sees what left block 0, past all hidden states in between."""

    def __init__(self, own: nn.Module, lowest: nn.Module) -> None:
        super().__init__()
        self.own, self.left = own, torch.zeros(())
        lowest.register_forward_hook(lambda _, inputs, output: setattr(self, "left", output))

    def forward(self, hidden: Tensor) -> Tensor:
        left = self.left if self.left.shape == hidden.shape else torch.zeros_like(hidden)
        return self.own(hidden + left)  # type: ignore[no-any-return]


def test_a_model_that_leaps_over_its_blocks_is_refused(tmp_path: Path) -> None:
    """Nothing raises there: the gradients of the lowest block are merely wrong."""
    node = node_of(shallow(tmp_path))
    trust.check_gradient(node, GRADIENTS[BISECTED], at_once=1)
    bert: Any = node.adapted.model.get_base_model().bert  # type: ignore[operator]
    bert.pooler = Leaping(bert.pooler, bert.encoder.layer[0])
    trust._bisected.clear()
    with pytest.raises(SpryError, match=r"bert model cannot be passed block by block \(the slope along .* difference"):
        trust.check_gradient(node, GRADIENTS[BISECTED], at_once=1)
    trust._bisected.clear()


@pytest.mark.parametrize(
    "keys",
    [{"model.dtype": "bfloat16"}, {"model.quantization": "nf4"}, {"model.quantization": "nf4", "adapter.dropout": 0.3}],
    ids=str,
)
def test_it_is_trusted_in_coarse_formats_too(tmp_path: Path, keys: dict[str, str]) -> None:
    """Whose rounding is no fault; and it is backprop's there too."""
    node = node_of(shallow(tmp_path, **keys))
    trust.check_gradient(node, GRADIENTS[BISECTED], at_once=1)
    (part,) = batch_of(node.adapted, node.train, range(4), 0, SEED)
    tensors = {name: value + 0.05 for name, value in node.adapted.tensors().items()}
    both = [estimate(name, part, tensors).gradient for name in ("backprop", BISECTED)]
    one, other = (torch.cat([found[name].flatten() for name in tensors]) for found in both)
    assert (one - other).norm() <= (0.05 if "model.dtype" in keys else 1e-5) * one.norm()


@pytest.mark.parametrize(("kind", "why"), [("prompt", "virtual tokens"), ("prefix", "virtual tokens")])
def test_virtual_tokens_are_refused(tmp_path: Path, kind: str, why: str) -> None:
    node = node_of(shallow(tmp_path, **{"adapter.kind": kind}))
    with pytest.raises(SpryError, match=rf'{why}.*set gradient to "checkpointed-backprop"'):
        trust.check_gradient(node, GRADIENTS[BISECTED], at_once=1)
