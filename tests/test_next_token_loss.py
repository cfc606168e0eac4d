"""The loss of causal language models with a LoRA adapter, in chunks: as transformers' own, forward and backward."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_blocks import SEED, adapt
from tiny_models import trainables
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from spry_app.autodiff.directions import Tensors, direction
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.autodiff.slopes import Part, forward_mode
from spry_app.autodiff.workspace import workspace
from spry_app.models import AdaptedModel

WORDS = 60
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
LLAMA = SIZES | {"intermediate_size": 32}
GEMMA, COHERE = LLAMA | {"num_key_value_heads": 2, "head_dim": 4}, LLAMA | {"pad_token_id": 0, "eos_token_id": 1}
MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), ["q_proj", "v_proj"]),
    "llama, adapted head": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), ["lm_head"]),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**SIZES)), ["c_attn"]),
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA, final_logit_softcapping=0.5)), ["q_proj", "v_proj"]),
    "cohere": (lambda: CohereForCausalLM(CohereConfig(**COHERE, logit_scale=0.25)), ["q_proj", "v_proj"]),
    "granite": (lambda: GraniteForCausalLM(GraniteConfig(**LLAMA, logits_scaling=3.0)), ["q_proj", "v_proj"]),
    "opt": (lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16)), ["q_proj", "v_proj"]),
}


def causal(model: PreTrainedModel, targets: list[str]) -> tuple[AdaptedModel, Tensors]:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=targets, fan_in_fan_out=model.config.model_type == "gpt2"
    )
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for tensor in adapted.parameters():
        if tensor.dim() > 1:
            tensor.data = 0.3 * torch.randn(tensor.shape, generator=generator)
    params = trainables(adapted.double())
    return adapt(adapted), params


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, WORDS, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :4] = -100  # as of a prompt whose answer alone counts
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("family", MODELS)
def test_it_is_the_loss_and_gradient_of_transformers_in_chunks_of_tokens(family: str, batch: dict[str, Tensor]) -> None:
    build, targets = MODELS[family]
    adapted, params = causal(build(), targets)
    leaves = {name: adapted.model.get_parameter(name).requires_grad_() for name in params}
    theirs = adapted.model(**batch).loss
    truth = dict(zip(leaves, torch.autograd.grad(theirs, list(leaves.values())), strict=True))
    adapted.model.requires_grad_(False)

    def objective(own: Tensors) -> Tensor:
        with workspace(4 * WORDS * 5):  # five tokens a chunk
            return adapted.next_token_loss(own, batch, batch["labels"])

    directions = [direction(SEED, k, params) for k in range(3)]
    expected = [sum((truth[n] * v[n]).sum().item() for n in v) for v in directions]
    for at_once in (1, 3):
        loss, slopes = forward_mode([Part(objective, 1.0)], params, directions, at_once)
        assert loss == pytest.approx(theirs.item(), rel=1e-6)  # theirs is in fp32
        assert slopes == pytest.approx(expected, rel=1e-5)
    for name in ("backprop", "checkpointed-backprop"):
        found = GRADIENTS[name].estimate([Part(objective, 1.0)], params, SEED, 1, 1).gradient
        for tensor, gradient in truth.items():
            torch.testing.assert_close(found[tensor].double(), gradient, rtol=1e-4, atol=1e-6)
    assert adapted.logits({}, batch).shape == (3, 9, WORDS)  # the head is in its place again
