"""The loss and its tangents, along one direction or several. Nothing here intercepts anything."""

import torch
import torch.nn.functional as F
from torch import Tensor

from spry_app.autodiff.fans import Fan


def cross_entropy(logits: Fan, targets: Tensor, ignored: int, reduction: str) -> tuple[Tensor, Tensor]:
    """Of logits (rows, classes): L = sum of -log p[target], dL = sum of (p - onehot(target)) dx; or their means.

    Beside logits and tangents there is one tensor of their size, whatever the number of directions.
    """
    x, xt = logits
    assert xt is not None
    log_p = x.log_softmax(-1)
    loss = F.nll_loss(log_p, targets, ignore_index=ignored, reduction=reduction)
    counts = targets != ignored
    gradient = log_p.exp_().scatter_add_(1, targets.where(counts, 0)[:, None], -torch.ones_like(log_p[:, :1]))
    gradient.mul_(counts[:, None])
    tangent = torch.stack([torch.dot(gradient.flatten(), one.flatten()) for one in xt])
    return loss, tangent / counts.sum() if reduction == "mean" else tangent
