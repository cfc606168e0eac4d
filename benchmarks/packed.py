"""Linear layers whose 4-bit weights are random from the start, so that no full weight is ever made. Nothing real is
quantised here.
"""

from collections.abc import Collection
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from spry_app.models.skeleton import BLOCK, packed_4_bit


def pack(model: nn.Module, skip: Collection[str], device: torch.device, dtype: torch.dtype) -> None:
    """Replace, in place, every linear layer of `model` outside of the children named in `skip`."""
    make = _bitsandbytes_layer if find_spec("bitsandbytes") else _stand_in
    for name, parent in list(model.named_modules()):
        for child, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and f"{name}.{child}".strip(".").split(".")[0] not in skip:
                packed = torch.empty(layer.weight.numel() // 2, 1, dtype=torch.uint8, device=device)
                absmax = torch.empty(layer.weight.numel() // BLOCK, device=device)
                setattr(parent, child, make(layer, packed.random_(0, 256), absmax.uniform_(0.02, 0.06), dtype))


def _bitsandbytes_layer(layer: nn.Linear, packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> nn.Linear:
    """The layer that the app makes of a checkpoint (spry_app.models.quantized), around random bytes."""
    from spry_app.models.quantized import Linear4bit

    layer.weight = packed_4_bit(packed, absmax, layer.weight.shape, "nf4", dtype)
    layer.__class__ = Linear4bit
    return layer


def _stand_in(layer: nn.Linear, packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> nn.Linear:
    return StandIn4bit(layer, packed, absmax)


class StandIn4bit(nn.Linear):
    """For machines without bitsandbytes: the bytes and the products of the app's 4-bit layer, not its kernel.

    It dequantises by looking up both halves of a byte in a table, with PyTorch's operations: slower than the kernel,
    and with temporaries of its own. On "meta" only the dense weight is made. The values are those of no format.
    """

    def __init__(self, layer: nn.Linear, packed: Tensor, absmax: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        self.absmax = nn.Buffer(absmax)
        levels = torch.linspace(-1, 1, 16, device=packed.device)
        self.pairs = nn.Buffer(torch.cartesian_prod(levels, levels))
        """Byte -> its two weights."""

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Shape (out_features, in_features), a new tensor."""
        shape = (self.out_features, self.in_features)
        if self.weight.is_meta:
            return self.absmax.new_empty(shape, dtype=dtype)
        blocks = F.embedding(self.weight.view(-1, BLOCK // 2).int(), self.pairs.to(dtype)).flatten(1)
        return blocks.mul_(self.absmax[:, None]).view(shape)

    def forward(self, input: Tensor) -> Tensor:
        """The graph keeps no dense weight: the backward pass dequantises again."""
        dense = self.dense_weight(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if not (torch.is_grad_enabled() and input.requires_grad):
            return F.linear(input, dense, bias)
        address = dense.untyped_storage()._cdata

        def keep(tensor: Tensor) -> Tensor | tuple[tuple[int, ...], tuple[int, ...]]:
            return (tuple(tensor.shape), tensor.stride()) if tensor.untyped_storage()._cdata == address else tensor

        def again(kept: Tensor | tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
            return kept if isinstance(kept, Tensor) else self.dense_weight(input.dtype).as_strided(*kept)

        with saved_tensors_hooks(keep, again):
            return F.linear(input, dense, bias)
