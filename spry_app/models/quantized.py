"""4-bit and 8-bit linear layers (bitsandbytes) that compute with their dequantised weight; nothing here quantises.

The stock layers return a zero or no tangent under forward-mode AD; in eval mode on CPU the 4-bit one repacks its
weight; the 8-bit one rounds its input too, which leaves its slope without meaning. Here the layer is the plain linear
map of its dequantised weight, in every mode. One weight at a time exists in full.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn.modules import Linear4bit as Stock4bit
from bitsandbytes.nn.modules import Linear8bitLt as Stock8bit
from torch import Tensor, nn
from torch.autograd import forward_ad


class _FrozenMatmul(torch.autograd.Function):
    """x @ weight.T whose backward pass dequantises again, so that the graph keeps no weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "_DequantisingLinear") -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense_weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.layer.dense_weight(grad.dtype), None


class _DequantisingLinear(nn.Linear):
    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Shape (out_features, in_features)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        backprop = torch.is_grad_enabled() and x.requires_grad
        if not backprop or forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            return F.linear(x, self.dense_weight(x.dtype), bias)
        out: Tensor = _FrozenMatmul.apply(x, self)  # type: ignore[no-untyped-call]
        return out if bias is None else out + bias


class Linear4bit(_DequantisingLinear, Stock4bit):
    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        weight: Any = self.weight
        state: QuantState = weight.quant_state
        # As rows of one block each: the CPU kernel of 0.50 returns wrong numbers for widths like 16, 48 or 80.
        rows = torch.Size((state.absmax.numel(), state.blocksize))
        packed = F.pad(weight.data.flatten(), (0, rows.numel() // 2 - weight.numel()))
        blocks = QuantState(state.absmax, rows, state.code, state.blocksize, state.quant_type, state.dtype)  # type: ignore[no-untyped-call]
        dense = dequantize_4bit(packed[:, None], blocks).flatten()[: self.in_features * self.out_features]
        return dense.view(self.out_features, self.in_features).to(dtype)


class Linear8bit(_DequantisingLinear, Stock8bit):
    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        weight: Any = self.weight
        dense: Tensor = int8_vectorwise_dequant(weight.data, weight.SCB)
        return dense.to(dtype)


_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {Stock4bit: Linear4bit, Stock8bit: Linear8bit}


def pass_tangents(model: nn.Module) -> None:
    """Turn every bitsandbytes linear layer of `model`, in place, into the one here; it stays an instance of its class.

    Call it before PEFT wraps the layers and before any forward pass.
    """
    for module in model.modules():
        replacement = _REPLACEMENTS.get(type(module))
        if replacement is not None:
            # A weight that the checkpoint lacks is drawn at random after quantisation, and stays in full.
            module.__class__ = nn.Linear if cast(Tensor, module.weight).is_floating_point() else replacement
