"""DoRA's layer with the derivative of what it computes; nothing here trains or saves.

PEFT takes the length of a row of the adapted matrix as a constant, to keep less for a backward pass (arXiv 2402.09353,
section 4.3). Its gradient is then not that of its loss, and differences between losses, which forward mode is checked
by, tell it to be wrong. Here the length has its derivative, and takes no product of the matrix's size but one with
`rank` more rows of input. What it computes, and what is saved, is PEFT's.
"""

from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Dora(DoraLinearLayer):
    """What DoRA adds to the output of a linear layer."""

    weight: nn.Parameter

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        scaling: float,
        base_layer: nn.Module,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """x: (..., inputs); base_result: (..., outputs), bias included, None where x has passed a dropout."""
        result = base_layer(x) if base_result is None else base_result
        bias = cast(Tensor | None, base_layer.bias)
        plain = result if bias is None else result - bias.to(result.dtype)
        factor = self.weight / lengths(base_layer, lora_A.weight, lora_B.weight, scaling)
        factor = factor.to(result.dtype)
        low: Tensor = lora_B(lora_A(x.to(lora_A.weight.dtype)))
        return (factor - 1) * plain + factor * low.to(result.dtype) * scaling


def lengths(base_layer: nn.Module, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Euclidean length of each row of W + scaling B A, shape (outputs,). a: (rank, inputs); b: (outputs, rank).

    |w + s b A|^2 = |w|^2 + 2 s b A w + s^2 b A A' b', row by row.
    """
    matrix = dense(base_layer, a.dtype)
    crossed = (b * (matrix @ a.T)).sum(1)
    return ((matrix * matrix).sum(1) + 2 * scaling * crossed + scaling**2 * (b * (b @ (a @ a.T))).sum(1)).sqrt()


def dense(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The frozen weight of a linear layer, quantised or not, shape (outputs, inputs)."""
    dequantised = getattr(layer, "dense_weight", None)
    if dequantised is not None:
        return cast(Tensor, dequantised(dtype))
    weight = cast(Tensor, layer.weight).to(dtype)
    return weight.T if isinstance(layer, Conv1D) else weight


@torch.no_grad()
def install_dora(model: PeftModel) -> None:
    """Put the layer here in place of PEFT's. Lengths begin as those of the weights that are used, dequantised."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, part in cast(Any, layer.lora_magnitude_vector).items():
                a, b = cast(Tensor, layer.lora_A[name].weight), cast(Tensor, layer.lora_B[name].weight)
                part.__class__ = Dora
                part.weight.copy_(lengths(layer.get_base_layer(), a, b, layer.scaling[name]))
