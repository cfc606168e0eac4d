"""Copies from the host to a device that nobody waits for. Nothing here comes back."""

import torch
from torch import Tensor


def onto(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` on `device`; itself if it is there in that format.

    From pinned memory, since the host would wait for any other copy, and so for all that the device has still to do.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype or tensor.dtype, non_blocking=True)
