"""Modules that lose or spoil a tangent, each in a way of its own, and a network around one. Not a test itself."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 64


class Network(nn.Module):
    """Trained layers below and above a suspicious one: the upper one keeps the tangent of the loss alive."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(WIDTH, WIDTH), middle, nn.Linear(WIDTH, 3)
        generator = torch.Generator().manual_seed(0)
        for tensor in (*self.first.parameters(), *self.head.parameters()):
            tensor.data = 0.2 * torch.randn(tensor.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.middle(torch.tanh(self.first(x)))))
        return out


def four_bit() -> nn.Module:
    """A stock 4-bit layer, quantised as it is moved to its device."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(WIDTH, WIDTH, quant_type="nf4", compute_dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    for tensor in layer.parameters():
        tensor.data = 0.2 * torch.randn(tensor.shape, generator=generator)
    quantised: nn.Module = layer.to("cpu")
    assert quantised.weight.dtype == torch.uint8
    return quantised


class Checkpointed(nn.Module):
    """Activation checkpointing of the old, reentrant kind around the lower trained layer."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        network = self.network
        with warnings.catch_warnings():  # "none of the inputs have requires_grad": a hint, no more
            warnings.simplefilter("ignore")
            hidden = checkpoint(lambda x: torch.tanh(network.first(x)), x, use_reentrant=True)
        out: Tensor = network.head(hidden)
        return out


class _Double(torch.autograd.Function):
    """y = 2 x with a wrong forward derivative, as a kernel's author might write it."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def jvp(ctx: object, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return 1.5 * tangent


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Double.apply(x)
        return out


class _Triple(torch.autograd.Function):
    """y = 3 x for backpropagation alone."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 3 * x


class Tripled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Triple.apply(x)
        return out


class Detached(nn.Module):
    """Its child is right; it loses the tangent itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.inner(x).detach().numpy())
