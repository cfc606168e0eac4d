"""Forward-equivalents: by hand for every way to a gradient, and as clients report them."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, tiny_run
from torch.utils.flop_counter import FlopCounterMode

from spry_app.autodiff.bisection import Chain
from spry_app.autodiff.costs import Cost, suffix_above
from spry_app.autodiff.directions import Seed, Tensors
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.autodiff.slopes import Part

CLIENTS, BATCH = 3, 8

HAND_DERIVED = {
    # K = 4 directions, two a pass where they can share one; the lowest trained block is the third of four: of every
    # pass forward, half lies below it. [nothing kept, that half kept]
    "forward-mode": [2 * 1 + 4 * 0.5, 2 * 0.5 + 4 * 0.5],  # two passes, and four tangents through the upper half
    "central-difference": [8, 4],  # two passes a direction
    "one-sided-difference": [5, 2.5],  # one a direction and one more
    "backprop": [1 + 0.5, 0.5 + 0.5],  # a pass and the way back: with frozen weights, gradients of inputs alone
    "checkpointed-backprop": [1 + 2 * 0.5, 0.5 + 2 * 0.5],  # the upper half once more
    "bisected-backprop": [1 + 4 * 0.5, 0.5 + 4 * 0.5],  # at the most: three times more, of 64 blocks
}


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    keys = {"client.micro-batch": 0, "client.directions": 4, "client.directions-at-once": 2, "server.evaluate-every": 9}
    return tiny_run(tmp_path_factory.mktemp("tiny")) | keys


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_step_costs_what_was_derived_by_hand(name: str) -> None:
    cost = GRADIENTS[name].cost(4, 2)
    assert [cost.forwards(suffix=0.5), cost.forwards(suffix=0.5, kept=0.5)] == HAND_DERIVED[name]


@pytest.mark.parametrize("name", [name for name in GRADIENTS if name != "checkpointed-backprop"])
def test_the_count_is_that_of_the_matrix_products_that_ran(name: str) -> None:
    """A stack of four frozen square matrices with a trained shift of the third's input, run under PyTorch's counter.

    Checkpointing is the objective's own work, so it is not to be seen here. Bisection keeps what enters block 2, passes
    that again to reach the middle, and then block 3: 1 + (2 + 2) / 4 and the way back.
    """
    width = 16
    frozen = [torch.randn(width, width, generator=torch.Generator().manual_seed(k)) / 4 for k in range(4)]

    def through(params: Tensors, low: int, high: int, hidden: torch.Tensor | None) -> torch.Tensor:
        x = torch.ones(3, width) if hidden is None else hidden
        for depth in range(low, high):
            x = torch.tanh((x + params["shift"] if depth == 2 else x) @ frozen[depth])
        return x

    def end(params: Tensors, hidden: torch.Tensor | None) -> torch.Tensor:
        assert hidden is not None
        return hidden.square().mean()

    def chain(names: Collection[str]) -> Chain:
        return Chain(range(2, 4), through({}, 0, 2, None), through, end)

    def objective(params: Tensors) -> torch.Tensor:
        return end(params, through(params, 0, 4, None))

    with FlopCounterMode(display=False) as counter:
        params = {"shift": torch.zeros(width)}
        estimate = GRADIENTS[name].estimate([Part(objective, 1.0, chain=chain)], params, Seed(0, 0, 0, 0), 4, 1)
    forward = 4 * 2 * 3 * width * width
    assert counter.get_total_flops() / forward == estimate.cost.forwards(suffix_above(2, 4))


def test_what_lies_above_all_blocks_has_no_suffix() -> None:
    assert [suffix_above(depth, 4) for depth in (0, 1, 4)] == [1.0, 0.75, 0.0]
    assert suffix_above(0, 0) == 0.0
    assert Cost(1, 2) + Cost(3) == Cost(4, 2)


def test_a_pass_through_some_blocks_costs_those_of_them_that_are_not_kept() -> None:
    """Two passes through the lower quarter and three through the rest; nothing, an eighth, a half, all kept."""
    cost = Cost(1) + Cost(0, stretches=((2, 0.0, 0.25), (3, 0.25, 1.0)))
    expected = [1 + 0.5 + 2.25, 0.875 + 0.25 + 2.25, 0.5 + 0 + 1.5, 0.0]
    assert [cost.forwards(1.0, kept) for kept in (0.0, 0.125, 0.5, 1.0)] == expected


@pytest.mark.parametrize(
    ("keys", "an_example"),
    [
        # Two blocks of which all are trained; two steps. Two passes with two directions each, and the head's with them.
        ({"method": "fedfgd"}, 2 + 4),
        ({"method": "fedfgd", "client.directions-at-once": 4}, 1 + 4),
        ({"method": "fedfgd", "head-gradient": "forward"}, 2 + 4),
        # Differences are not taken at the tensors themselves: one more for the head.
        ({"method": "fedmezo"}, 8 + 1),
        ({"method": "baffle"}, 5 + 1),
        ({"method": "decomfl"}, 5 + 1),
        ({"method": "fwdllm", "client.variance-threshold": 0.0}, 8 + 1),
        ({"method": "fwdllm", "client.variance-threshold": 1e9}, 2 * 2 + 1),  # two directions always
        # Below the cut two passes for each of the four directions, above it two for each of their three.
        ({"method": "fedspzo", "client.upper-directions": 3}, 0.5 * 2 * 4 + 0.5 * 2 * 4 * 3 + 1),
        ({"method": "fedavg"}, 2),
        ({"method": "fedavg", "gradient": "checkpointed-backprop"}, 3),
        # The lower block once more, and again with the upper one: 1 + 1 of two blocks, one pass.
        ({"method": "fedavg", "gradient": "bisected-backprop"}, 3),
        ({"method": "fedsgd"}, 2),
        # The head alone: one pass, and nothing goes back through the blocks.
        ({"method": "fedavg", "adapter.kind": "none", "client.prefix-cache-mib": 0}, 1),
    ],
)
def test_clients_report_what_was_derived_by_hand(
    keys: dict[str, Any], an_example: float, run_config: dict, tmp_path: Path
) -> None:
    federation = Federation(tmp_path, run_config | keys)
    federation.start(CLIENTS, rounds=2)
    expected = [CLIENTS * 2 * BATCH * an_example * rounds for rounds in range(3)]
    lines = [json.loads(line) for line in federation.recorder.metrics_path.read_text().splitlines()]
    assert [line["forwards"] for line in lines] == pytest.approx(expected)


@pytest.mark.parametrize(("cache_mib", "steps", "an_example"), [(0, 3, 3 * (1 + 0.5)), (64, 3, 0.5 + 3 * (0.5 + 0.5))])
def test_what_is_kept_below_the_lowest_unit_is_paid_once(
    cache_mib: int, steps: int, an_example: float, run_config: dict, tmp_path: Path
) -> None:
    """One client holds the upper of two blocks and sees the same batch in every step, as its shard has no other."""
    keys = {"method": "fedavg-split", "assign": "by-depth", "client.prefix-cache-mib": cache_mib, "head": "split"}
    keys |= {"client.batch-size": 24, "client.local-steps": steps}
    federation = Federation(tmp_path, run_config | keys)
    upper = [unit for unit in federation.strategy.units if ".layer.1." in unit]
    federation.strategy.assign = lambda *_: [upper] * CLIENTS  # type: ignore[method-assign]
    federation.start(CLIENTS, rounds=1)
    assert federation.recorder.rounds[-1].forwards == pytest.approx(CLIENTS * 24 * an_example)
