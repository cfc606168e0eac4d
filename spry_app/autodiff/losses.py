"""The loss and its tangents, along one direction or several. Nothing here intercepts anything."""

import torch
import torch.nn.functional as F
from torch import Tensor

from spry_app.autodiff.fans import Fan


def cross_entropy(logits: Fan, targets: Tensor, ignored: int, reduction: str) -> tuple[Tensor, Tensor]:
    """Of logits (rows, classes): L = sum of -log p[target], dL = sum of (p dx - dx[target]); or their means.

    Beside logits and tangents there is one tensor of their size, whatever the number of directions; PyTorch's own rule
    makes up to four for each. The sum over classes is a product a row: it keeps no p dx, and its digits.
    """
    x, xt = logits
    assert xt is not None
    log_p = x.log_softmax(-1)
    loss = F.nll_loss(log_p, targets, ignore_index=ignored, reduction=reduction)
    counts = targets != ignored
    index, p = targets.where(counts, 0).unsqueeze(-1), log_p.exp_().unsqueeze(1)

    def along(moved: Tensor) -> Tensor:
        rows = torch.bmm(p, moved.unsqueeze(-1)).squeeze(-1) - moved.gather(-1, index)
        return rows.squeeze(-1).where(counts, 0.0).sum()

    tangent = torch.stack([along(moved) for moved in xt])
    return loss, tangent / counts.sum() if reduction == "mean" else tangent
