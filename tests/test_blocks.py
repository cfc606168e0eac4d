"""Passes that leave blocks out, and checkpointed backpropagation: the same numbers as whole passes give."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_base, tiny_batch, tiny_model, trainables
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AlbertConfig, AlbertForSequenceClassification

from spry_app.autodiff.directions import Seed, Tensors
from spry_app.autodiff.gradients import GRADIENTS, Estimate
from spry_app.autodiff.memory import peak_mib
from spry_app.autodiff.slopes import Part
from spry_app.models import AdaptedModel, Entering, NoPrefixError
from spry_app.models.blocks import install
from spry_app.models.units import group

FAMILIES = ("bert", "roberta", "distilbert", "llama", "opt")
DROPOUT = 0.3
SEED = Seed(0, 0, 0, 0)


def adapt(model: nn.Module) -> AdaptedModel:
    model.config.use_cache = False
    units = group(model)
    blocks = install(model.eval().requires_grad_(False))
    return AdaptedModel(model, None, units, "", torch.device("cpu"), blocks)


def adapted_tiny(family: str) -> tuple[AdaptedModel, Tensors]:
    model = tiny_model(family, torch.float64)
    for part in model.modules():
        if hasattr(part, "lora_dropout"):
            part.lora_dropout["default"] = nn.Dropout(DROPOUT)
    params = trainables(model)
    return adapt(model), params


class Loss:
    """Cross-entropy of one batch."""

    def __init__(self, adapted: AdaptedModel, dropout: int | None = None, entering: Entering | None = None) -> None:
        self.adapted, self.dropout, self.entering = adapted, dropout, entering
        self.batch = tiny_batch()

    def __call__(self, params: Tensors) -> torch.Tensor:
        logits = self.adapted.logits(params, self.batch, self.dropout, self.entering)
        return cross_entropy(logits.double(), self.batch["labels"])


@contextmanager
def runs_of_the_lowest_block(adapted: AdaptedModel) -> Iterator[list[None]]:
    """As long as the list is how often it was computed."""
    runs: list[None] = []
    lowest = adapted.model.get_submodule(adapted.blocks[0])
    part = next(part for part in lowest.modules() if isinstance(part, nn.Linear))
    hook = part.register_forward_hook(lambda *_: runs.append(None))
    yield runs
    hook.remove()


def estimate(name: str, loss: Loss, params: Tensors, directions: int = 1, at_once: int = 1) -> Estimate:
    return GRADIENTS[name].estimate([Part(loss, 1.0)], params, SEED, directions, at_once)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_backprop_gives_the_gradient_of_backprop_with_dropout_too(family: str) -> None:
    adapted, params = adapted_tiny(family)
    plain = estimate("backprop", Loss(adapted, dropout=3), params)
    with runs_of_the_lowest_block(adapted) as runs:
        again = estimate("checkpointed-backprop", Loss(adapted, dropout=3), params)
    assert len(runs) == 2  # the block was computed a second time, so it had been forgotten
    assert again.loss == plain.loss
    assert not torch.equal(
        estimate("backprop", Loss(adapted, dropout=4), params).gradient[next(iter(params))],
        plain.gradient[next(iter(params))],
    )
    for name, expected in plain.gradient.items():
        torch.testing.assert_close(again.gradient[name], expected, rtol=0, atol=0)
        assert expected.count_nonzero() or "lora" not in name


def test_checkpointed_backprop_keeps_less() -> None:
    base = tiny_base("bert")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    params = trainables(model)
    loss = Loss(adapt(model))
    loss.batch = tiny_batch(examples=16, length=32)
    plain, less = (
        peak_mib(lambda name=name: estimate(name, loss, params), "cpu")
        for name in ("backprop", "checkpointed-backprop")
    )
    assert less < 0.75 * plain  # two blocks; one is alive at a time


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [1, 2])
def test_a_pass_that_starts_higher_gives_the_same_slopes_and_gradients(family: str, depth: int) -> None:
    adapted, params = adapted_tiny(family)
    own = {name: value for name, value in params.items() if adapted.depth([name]) >= depth}
    assert own
    assert adapted.depth(own) == (depth if depth < len(adapted.blocks) else len(adapted.blocks))
    whole = Loss(adapted)
    entering = adapted.prefix(whole.batch, depth)
    for name, at_once in (("forward-mode", 1), ("forward-mode", 3), ("central-difference", 1), ("backprop", 1)):
        expected = estimate(name, whole, own, 3, at_once)
        with runs_of_the_lowest_block(adapted) as runs:
            got = estimate(name, Loss(adapted, entering=entering), own, 3, at_once)
        assert not runs
        assert got.loss == expected.loss
        assert got.slopes == pytest.approx(expected.slopes, rel=1e-12)
        for tensor in own:
            torch.testing.assert_close(got.gradient[tensor], expected.gradient[tensor], rtol=1e-6, atol=1e-9)


def test_the_lowest_block_of_tensors_is_found_and_the_head_is_above_all() -> None:
    adapted, params = adapted_tiny("llama")
    assert len(adapted.blocks) == 2
    assert adapted.depth(adapted.units["head"]) == 2
    assert adapted.depth(params) == 0
    assert adapted.depth(["base_model.model.model.embed_tokens.weight"]) == 0  # below them: no prefix to keep


def test_a_model_that_shares_its_layers_has_no_prefix_and_says_so() -> None:
    config = AlbertConfig(
        vocab_size=97,
        embedding_size=16,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=32,
    )
    base = AlbertForSequenceClassification(config)
    adapted = adapt(get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])))
    assert len(adapted.blocks) == 1
    with pytest.raises(NoPrefixError, match="block 0 ran where block 1 was due"):
        adapted.logits({}, tiny_batch(), entering=Entering(1, adapted.prefix(tiny_batch(), 1).hidden))
