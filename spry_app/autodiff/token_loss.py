"""Cross-entropy over a vocabulary without all logits at once. Which model makes the hidden states is not known here."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spry_app.autodiff.duals import wide
from spry_app.autodiff.workspace import DEFAULT_BYTES, workspace_bytes

IGNORED = -100
"""Target of a token that does not count, as in PyTorch and transformers."""

FEWEST_TOKENS = 64
"""In a chunk, while nobody asks for less: the head's weight is read once a chunk."""


def token_loss(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, vocabulary: int) -> Tensor:
    """Mean loss of the tokens that count, fp32 at least; 0 where none does.

    hidden: (..., width). head: (tokens, width) -> logits (tokens, vocabulary). targets: (...), int64. Logits, and
    tangents of logits, exist for a chunk of tokens at a time: about workspace_bytes() each. Differentiable both ways;
    a backward pass computes the logits of each chunk again. Never waits for the device.
    """
    rows, wanted = hidden.flatten(0, -2), targets.flatten()
    total = wide(rows.new_zeros(()))
    size = _tokens_at_once(vocabulary)
    for some, their in zip(torch.split(rows, size), torch.split(wanted, size), strict=True):
        total = total + _forgetting(_summed, some, head, their)
    return total / (wanted != IGNORED).sum().clamp(min=1)


@torch.no_grad()
def token_scores(
    hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """The loss of each token, 0 where it does not count, and whether it counts and has the largest logit; see
    `token_loss`. Shapes: those of `targets`.
    """
    rows, wanted, size = hidden.flatten(0, -2), targets.flatten(), _tokens_at_once(vocabulary)
    losses, hits = [], []
    for some, their in zip(torch.split(rows, size), torch.split(wanted, size), strict=True):
        logits = wide(head(some))
        losses.append(F.cross_entropy(logits, their, ignore_index=IGNORED, reduction="none"))
        hits.append(logits.argmax(-1) == their)
    return torch.cat(losses).view_as(targets), torch.cat(hits).view_as(targets)


def _summed(rows: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(wide(head(rows)), targets, ignore_index=IGNORED, reduction="sum")


def _forgetting(function: Callable[..., Tensor], *args: object) -> Tensor:
    if not torch.is_grad_enabled():
        return function(*args)
    again: Tensor = checkpoint(function, *args, use_reentrant=False)
    return again


def _tokens_at_once(vocabulary: int) -> int:
    fit = workspace_bytes() // (4 * vocabulary)
    return max(1, fit if workspace_bytes() < DEFAULT_BYTES else max(fit, FEWEST_TOKENS))
