"""Angles between estimates and true gradients, measured and expected: pure readings of what rounds saw."""

import math
from collections.abc import Iterable, Sequence

import torch

from benchmarks.one_round import Seen
from spry_app.methods.noise import RELATIVE_NOISE
from spry_app.protocol import Tensors


def flat(tensors: Tensors, names: Iterable[str]) -> torch.Tensor:
    """One after the other, in the order of the names, float64."""
    return torch.cat([tensors[name].double().reshape(-1) for name in names])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two flat tensors; not a number where one of them is zero."""
    return float((a @ b / (a.norm() * b.norm())).item())


def unlikeness(exact: Seen, names: Sequence[str]) -> float:
    """Mean |g_i|^2 of the clients over the |g|^2 of their mean: 1 where they are alike."""
    each = torch.stack([flat(reply.tensors, names).square().sum() for reply in exact.replies])
    return float((each.mean() / flat(exact.mean, names).square().sum()).item())


def expected_cosine(kind: str, directions: int, seen: Seen, unlike: float) -> float:
    """|g|^2 / (|g| |mean estimate|), the latter by its mean square: for clients with as many numbers as these have on
    average.
    """
    clients, sizes = len(seen.perturbed), {name: size for one in seen.perturbed for name, size in one.items()}
    dimension = sum(sum(one.values()) for one in seen.perturbed) / clients
    holders = dimension * clients / sum(sizes.values())
    taken = min(directions, dimension) if kind == "orthogonal" else directions
    return 1 / math.sqrt(relative_square(kind, dimension, taken, holders, clients, unlike))


def relative_square(
    kind: str, dimension: float, directions: float, holders: float, clients: int, unlike: float
) -> float:
    """E|mean estimate|^2 / |g|^2, of which 1 is the gradient and the rest is noise.

    Each of `holders` of the `clients` perturbs the same `dimension` numbers (d) along K `directions`. unlike: see
    `unlikeness`. Alike clients have the noise of methods.noise for K holders directions in all. Unlike ones add that
    not every client measures every number: the variance of a mean of some, drawn without replacement.
    """
    among = (unlike - 1) * clients / (clients - 1) if clients > 1 else 0.0
    measured = directions * holders
    noise = RELATIVE_NOISE[kind](dimension, measured)
    if kind == "gaussian":
        return 1 + among * (1 / holders - 1 / clients) + unlike * noise
    if measured < dimension:
        return unlike * (1 + noise)
    return 1 + among * max(0.0, dimension / measured - 1 / clients)
