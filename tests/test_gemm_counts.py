"""Multiply-adds of matrix products in one step of forward mode, as derived by hand: exactly, never timed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_models import LABELS, PAD, USUAL, WORDS, some_directions, trainables
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from spry_app.autodiff.slopes import Objective, Part, forward_mode

WIDTH, INNER, HEADS, KEY_HEADS, BLOCKS, RANK = 64, 256, 4, 2, 4, 1
EXAMPLES, LENGTH = 2, 24
TOKENS = EXAMPLES * LENGTH
SIZES = USUAL | {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": BLOCKS}
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}

SMALL = 0.08
"""What a pass and its tangents may cost beyond whole passes, in passes a direction. A product of two things that both
move has two terms in its tangent: scores and outputs of attention (5 to 8 % of these models' products, and fewer the
wider a model is) and LoRA (1 %) count twice. Query, key and value of the lowest block, whose input stays, count less.
"""


@dataclass(frozen=True)
class Shape:
    """Multiply-adds of a pass, a group each."""

    qkv: int
    others: int
    lora_a: int
    lora_b: int
    scores: int
    frozen_head: int
    head: int

    def forward(self, directions: int, lowest: int, moving_head: bool) -> int:
        """Of value and tangents when the LoRA matrices of block `lowest` and above move.

        A product takes one for the value, and for a direction one for each of its two factors that moves.
        """
        one, both = 1 + directions, 1 + 2 * directions
        above = one * (self.qkv + self.others) + both * (self.lora_a + self.lora_b + 2 * self.scores)
        first = self.qkv + one * (self.others + self.lora_a + self.scores) + both * (self.lora_b + self.scores)
        head = one * self.frozen_head + (both if moving_head else one) * self.head
        loss = directions * EXAMPLES * LABELS  # softmax times the tangents of the logits
        return lowest * self.block + first + (BLOCKS - 1 - lowest) * above + head + loss

    @property
    def block(self) -> int:
        return self.qkv + self.others + self.lora_a + self.lora_b + 2 * self.scores

    @property
    def inference(self) -> int:
        return BLOCKS * self.block + self.frozen_head + self.head


SHAPES = {
    "bert": Shape(
        qkv=TOKENS * 3 * WIDTH * WIDTH,
        others=TOKENS * (WIDTH * WIDTH + 2 * WIDTH * INNER),
        lora_a=TOKENS * 2 * WIDTH * RANK,
        lora_b=TOKENS * 2 * RANK * WIDTH,
        scores=TOKENS * LENGTH * WIDTH,  # of all heads; their products with the values are as many
        frozen_head=EXAMPLES * WIDTH * WIDTH,  # the pooler
        head=EXAMPLES * WIDTH * LABELS,
    ),
    "llama": Shape(
        qkv=TOKENS * WIDTH * (WIDTH + 2 * WIDTH // 2),  # two query heads share a key head
        others=TOKENS * (WIDTH * WIDTH + 3 * WIDTH * INNER),
        lora_a=TOKENS * 2 * WIDTH * RANK,
        lora_b=TOKENS * RANK * (WIDTH + WIDTH // 2),
        scores=TOKENS * LENGTH * WIDTH,
        frozen_head=0,
        head=TOKENS * WIDTH * LABELS,  # of every token; the last one's is taken
    ),
}


class Products(TorchDispatchMode):
    """Counts beneath dual numbers and torch.vmap, where every product is one of these operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        # Others would go uncounted (the backends of attention: see counting).
        assert name not in {"linear", "matmul", "mv", "dot", "addmv", "addbmm"} and "scaled_dot_product" not in name, (
            name
        )
        if name in {"mm", "bmm", "addmm", "baddbmm"}:
            left, right = args[-2:]
            self.count += left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def counted(step: Callable[[], object]) -> int:
    """Without the fused kernels, whose products cannot be seen; ours are not among them."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Products() as products:
        step()
    return products.count


def model_of(family: str) -> torch.nn.Module:
    if family == "bert":
        base: Any = BertForSequenceClassification(BertConfig(**SIZES))
    else:
        base = LlamaForSequenceClassification(LlamaConfig(num_key_value_heads=KEY_HEADS, use_cache=False, **SIZES))
    config = LoraConfig(task_type="SEQ_CLS", r=RANK, target_modules=TARGETS[family])
    return get_peft_model(base, config).eval()


@pytest.fixture(scope="module", params=list(SHAPES))
def case(request: pytest.FixtureRequest) -> tuple[Shape, Objective, dict[str, Tensor]]:
    """No padding: a rule may leave masked keys out, and would cost less."""
    family: str = request.param
    model = model_of(family)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(PAD + 1, WORDS, (EXAMPLES, LENGTH), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.randint(0, LABELS, (EXAMPLES,), generator=generator)

    def loss(own: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, own, kwargs=inputs).logits, labels)

    return SHAPES[family], loss, trainables(model)


def step(loss: Objective, own: dict[str, Tensor], directions: int, at_once: int) -> int:
    moving = some_directions(own, directions)
    return counted(lambda: forward_mode([Part(loss, 1.0)], own, moving, at_once))


def above(params: dict[str, Tensor], block: int) -> dict[str, Tensor]:
    """LoRA matrices of `block` and all blocks over it."""
    return {name: p for name, p in params.items() if any(f".{k}." in name for k in range(block, BLOCKS))}


def test_a_pass_without_tangents_is_what_was_derived(case: tuple[Shape, Objective, dict[str, Tensor]]) -> None:
    shape, loss, params = case
    assert counted(lambda: loss(params)) == shape.inference


@pytest.mark.parametrize("directions", [1, 4])
def test_all_units_cost_a_pass_and_one_for_each_direction_that_shares_it(
    case: tuple[Shape, Objective, dict[str, Tensor]], directions: int
) -> None:
    shape, loss, params = case
    count = step(loss, params, directions, directions)
    assert count == shape.forward(directions, 0, moving_head=True)
    assert abs(count / shape.inference - (1 + directions)) < SMALL * directions


@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("lowest", [1, BLOCKS - 1])
def test_upper_units_cost_a_pass_and_the_suffix_for_each_direction(
    case: tuple[Shape, Objective, dict[str, Tensor]], directions: int, lowest: int
) -> None:
    shape, loss, params = case
    count = step(loss, above(params, lowest), directions, directions)
    assert count == shape.forward(directions, lowest, moving_head=False)
    assert abs(count / shape.inference - (1 + directions * (BLOCKS - lowest) / BLOCKS)) < SMALL * directions


def test_pytorchs_own_rules_cost_a_third_product_in_frozen_layers(
    case: tuple[Shape, Objective, dict[str, Tensor]],
) -> None:
    """So that the counts above would tell: the same step by torch.func alone."""
    shape, loss, params = case
    (v,) = some_directions(params, 1)
    own = counted(lambda: torch.func.jvp(loss, (params,), (v,)))
    assert own - step(loss, params, 1, 1) > 0.85 * shape.inference
