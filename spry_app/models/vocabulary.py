"""The output layer of a language model: what comes to it, and the logits it makes of some of that. No loss."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

_CHANGES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: cap * torch.tanh(logits / cap),  # Gemma 2
    "logit_scale": lambda logits, scale: logits * scale,  # Cohere
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
}
"""What a model does with its logits after the output layer, by the key of its configuration that says how much."""


class _Reached(Exception):
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def before_output_layer(model: PeftModel, run: Callable[[], Tensor]) -> Tensor:
    """The hidden states that the output layer is given when `run` calls the model, which stops there.

    Where there is no output layer over the vocabulary, what `run` returns.
    """
    head = _output_layer(model)
    if head is None:
        return run()

    def stop(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        raise _Reached(hidden)

    head.forward = stop
    try:
        return run()
    except _Reached as reached:
        return reached.hidden
    finally:
        del head.forward  # the instance's; that of its class is back


def logits_of(model: PeftModel, placed: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Of hidden states (tokens, width) before the output layer, with `placed` in place of tensors of the layer's own.

    Shape (tokens, vocabulary).
    """
    head = _output_layer(model)
    assert head is not None, "the model has no output layer over a vocabulary"
    name = next(name for name, part in model.named_modules() if part is head)
    own = {key.removeprefix(f"{name}."): value for key, value in placed.items() if key.startswith(f"{name}.")}
    logits: Tensor = functional_call(head, own, (hidden,))
    for key, change in _CHANGES.items():
        if (how := getattr(model.config, key, None)) is not None:
            logits = change(logits, how)
    return logits


def _output_layer(model: PeftModel) -> nn.Module | None:
    found: nn.Module | None = cast(PreTrainedModel, model.get_base_model()).get_output_embeddings()  # type: ignore[no-untyped-call]
    return found
