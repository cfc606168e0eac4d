"""A node refuses to train on a gradient that is wrong or does not do what it promises."""

import dataclasses
from pathlib import Path

import pytest
import torch
from federation import make_checkpoint, make_rows
from torch import nn

from spry_app.autodiff.gradients import GRADIENTS
from spry_app.client.node import Node, load_node
from spry_app.client.trust import check_gradient
from spry_app.config import RunConfig
from spry_app.errors import SpryError


@pytest.fixture
def node(tmp_path: Path) -> Node:
    flat = RunConfig.defaults() | {
        "model.name": str(make_checkpoint(tmp_path / "model")),
        "data.source": str(make_rows(tmp_path / "rows.jsonl", 8)),
        "data.partition": "iid",
    }
    return load_node(RunConfig.from_flower(flat), {"partition-id": 0, "num-partitions": 1})


class Forgetful(nn.Module):
    """As a custom kernel does: the value goes through, its tangent does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach() if not torch.is_grad_enabled() else x


def test_forward_mode_is_tested_on_the_model_as_it_is(node: Node) -> None:
    check_gradient(node, GRADIENTS["forward-mode"], at_once=1)


def test_a_lost_tangent_is_refused_whatever_the_gradient_is_called(node: Node) -> None:
    node.adapted.model.get_submodule(node.adapted.blocks[1]).attention.output.dropout = Forgetful()
    lost = dataclasses.replace(GRADIENTS["forward-mode"], name="of my own")
    with pytest.raises(SpryError, match="Self-test of forward mode failed"):
        check_gradient(node, lost, at_once=1)
    check_gradient(node, GRADIENTS["central-difference"], at_once=1)


def test_checkpointing_without_blocks_is_refused_with_what_to_set(node: Node) -> None:
    check_gradient(node, GRADIENTS["checkpointed-backprop"], at_once=1)
    without = dataclasses.replace(node, adapted=dataclasses.replace(node.adapted, blocks=()))
    with pytest.raises(SpryError, match=r'blocks of this bert model are not known.*set gradient to "backprop"'):
        check_gradient(without, GRADIENTS["checkpointed-backprop"], at_once=1)
