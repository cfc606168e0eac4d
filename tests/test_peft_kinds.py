"""Forward mode through every kind of PEFT adapter, against backprop in float64, alone and shared; or a refusal."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from tiny_models import Float64, slopes_by_backprop, some_directions, tiny_base, tiny_batch, trainables
from torch import Tensor
from torch.func import functional_call

from spry_app.autodiff.self_check import SelfTestError, self_test
from spry_app.autodiff.slopes import Objective, Part, forward_mode


@dataclass(frozen=True)
class Names:
    """What a family calls the modules that adapters change."""

    query_value: list[str]
    same_shape: list[str]
    inner: list[str]
    norms: list[str]


NAMES = {
    "bert": Names(["query", "value"], ["query", "value"], ["intermediate.dense"], ["LayerNorm"]),
    "llama": Names(
        ["q_proj", "v_proj"],
        ["q_proj", "o_proj"],
        ["down_proj"],
        ["input_layernorm", "post_attention_layernorm", "norm"],
    ),
}

VIRTUAL = {"num_virtual_tokens": 3, "task_type": "SEQ_CLS"}


def _configs(names: Names) -> dict[str, tuple[PeftConfig, set[str]]]:
    """Kind -> (PEFT's configuration, what each of its tensors is called, as a part of the name)."""
    low = {"r": 2, "target_modules": names.query_value, "task_type": "SEQ_CLS"}
    inner = {"feedforward_modules": names.inner, "target_modules": names.query_value + names.inner}
    shared = {"r": 4, "target_modules": names.same_shape, "task_type": "SEQ_CLS"}
    lora = {"lora_A", "lora_B"}
    return {
        "rslora": (LoraConfig(use_rslora=True, lora_alpha=3, **low), lora),
        "dora": (LoraConfig(use_dora=True, **low), lora | {"lora_magnitude_vector"}),
        "biases": (LoraConfig(bias="all", **low), lora | {".bias"}),
        "ia3": (IA3Config(task_type="SEQ_CLS", **inner), {"ia3_l"}),
        "vera": (VeraConfig(**shared), {"vera_lambda_b", "vera_lambda_d"}),
        "loha": (LoHaConfig(**low), {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
        "lokr": (LoKrConfig(**low), {"lokr_w1", "lokr_w2"}),
        "norms": (LNTuningConfig(target_modules=names.norms, task_type="SEQ_CLS"), {"orm"}),
        "prompt": (PromptTuningConfig(**VIRTUAL), {"prompt_encoder"}),
        "prompt-encoder": (PromptEncoderConfig(encoder_hidden_size=8, **VIRTUAL), {"embedding", "mlp_head"}),
        "prefix": (PrefixTuningConfig(**VIRTUAL), {"prompt_encoder"}),
    }


CASES = [(family, kind) for family, names in NAMES.items() for kind in _configs(names)]
REFUSED = "loha"
"""PEFT computes its product in an autograd.Function without a forward derivative (tuners/loha, HadaWeight)."""


def _case(family: str, kind: str) -> tuple[PeftModel, Objective, dict[str, Tensor]]:
    """A model whose adapter is moved away from its start, where much of it has no slope; and its loss."""
    config, parts = _configs(NAMES[family])[kind]
    model = get_peft_model(tiny_base(family), config).double().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    batch = tiny_batch()
    labels = batch.pop("labels")

    def loss(own: dict[str, Tensor]) -> Tensor:
        with Float64():
            return F.cross_entropy(functional_call(model, own, kwargs=batch).logits, labels)

    adapter = {name: p for name, p in trainables(model).items() if "classifier" not in name and "score" not in name}
    if family == "llama" and kind == "biases":
        parts = parts - {".bias"}  # Llama has none
    assert adapter and all(any(part in name for name in adapter) for part in parts), sorted(adapter)
    return model, loss, adapter


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # of norms; PEFT says the same of all
@pytest.mark.filterwarnings("ignore:.*will not detect padding tokens in `inputs_embeds`")
@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize(("family", "kind"), [case for case in CASES if case[1] != REFUSED])
def test_slopes_of_an_adapter_are_backprops_in_float64(family: str, kind: str, at_once: int) -> None:
    """Of the adapter alone, whose slopes those of the head would hide."""
    _, loss, adapter = _case(family, kind)
    directions = some_directions(adapter, 3)
    truth = slopes_by_backprop(loss, adapter, directions)
    assert min(map(abs, truth)) > 1e-6
    _, slopes = forward_mode([Part(loss, 1.0)], adapter, directions, at_once)
    assert slopes == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("family", NAMES)
def test_an_adapter_without_a_forward_derivative_is_refused_never_trained(family: str) -> None:
    model, loss, adapter = _case(family, REFUSED)
    assert any(slopes_by_backprop(loss, adapter, some_directions(adapter, 1)))
    for at_once, words in ((1, "must implement the jvp function"), (3, "must override the setup_context")):
        with pytest.raises(RuntimeError, match=words):
            forward_mode([Part(loss, 1.0)], adapter, some_directions(adapter, 3), at_once)
    with pytest.raises(SelfTestError, match=r"the slope along '.*hada_w#_a.*' is missing"):
        self_test(loss, adapter, model)
