"""Noise as expected and as measured, against estimates that were drawn: fixed seeds, five standard errors."""

import math
from typing import get_args

import pytest
import torch

from spry_app.config import keys
from spry_app.methods.noise import (
    MOSTLY_NOISE,
    RELATIVE_NOISE,
    Hand,
    Noise,
    expected_cosines,
    fewest_directions,
    measured_noise,
    overall,
    relative_noise,
    warning,
)

DRAWS = 4000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frames(kind: str, draws: int, count: int, dimensions: int) -> torch.Tensor:
    """Directions, drawn by torch: normal ones, or orthonormal ones of a QR decomposition times sqrt(d)."""
    normal = torch.randn(draws, dimensions, dimensions, generator=generator(), dtype=torch.float64)
    if kind == "gaussian":
        return torch.randn(draws, count, dimensions, generator=generator(), dtype=torch.float64)
    return torch.linalg.qr(normal).Q.mT[:, :count] * math.sqrt(dimensions)


def of_one_client(dimensions: int, directions: int, kind: str) -> float:
    return expected_cosines([Hand(("a",), dimensions, directions)], kind)["a"]


def within_five_errors(drawn: torch.Tensor, expected: float) -> bool:
    return abs(float(drawn.mean()) - expected) <= 5 * float(drawn.std()) / len(drawn) ** 0.5 + 1e-9


@pytest.mark.parametrize("kind", RELATIVE_NOISE)
@pytest.mark.parametrize(("dimensions", "directions"), [(1, 1), (12, 1), (12, 5), (12, 12)])
def test_the_expected_cosine_is_that_of_drawn_estimates(kind: str, dimensions: int, directions: int) -> None:
    """cos^2 = E[g' . g]^2 / (E|g'|^2 |g|^2), where E[g'] = g: so 1 / cos^2 = E|g'|^2 / |g|^2."""
    g = torch.linspace(-1, 2, dimensions, dtype=torch.float64)
    v = frames(kind, DRAWS, directions, dimensions)
    estimates = ((v @ g)[:, :, None] * v).mean(1)
    lengths = estimates.square().sum(1) / g.square().sum()
    assert within_five_errors(lengths, of_one_client(dimensions, directions, kind) ** -2)
    n, d = directions, dimensions
    formula = {"gaussian": math.sqrt(n / (d + n + 1)), "orthogonal": math.sqrt(n / d)}[kind]
    assert of_one_client(dimensions, directions, kind) == pytest.approx(formula, rel=1e-12)


def test_every_kind_of_directions_has_its_formula() -> None:
    assert set(get_args(dict(keys())["directions"].annotation)) == {"", *RELATIVE_NOISE}


def test_nothing_perturbed_has_no_noise_and_a_whole_frame_neither() -> None:
    assert relative_noise(0, 1, "gaussian") == relative_noise(0, 1, "orthogonal") == 0.0
    assert expected_cosines([Hand(("a",), 0, 1)]) == {}
    assert of_one_client(5, 5, "orthogonal") == of_one_client(5, 9, "orthogonal") == 1.0


@pytest.mark.parametrize("kind", RELATIVE_NOISE)
def test_clients_of_unequal_weight_share_a_frame_or_draw_their_own(kind: str) -> None:
    """One client with one direction and one with three, two thirds of the examples on the second."""
    d, g = 8, torch.linspace(-1, 2, 8, dtype=torch.float64)
    v = frames(kind, DRAWS, 4, d)
    one, three = (((part @ g)[:, :, None] * part).mean(1) for part in (v[:, :1], v[:, 1:]))
    lengths = (one / 3 + three * 2 / 3).square().sum(1) / g.square().sum()
    cosine = expected_cosines([Hand(("a",), d, 1, 5), Hand(("a",), d, 3, 10)], kind)["a"]
    assert within_five_errors(lengths, cosine**-2)


@pytest.mark.parametrize("kind", RELATIVE_NOISE)
def test_each_unit_counts_its_holders_and_all_that_they_perturb(kind: str) -> None:
    hands = [
        Hand(("a", "b"), 30, 2),
        Hand(("a", "b"), 30, 2),
        Hand(("c",), 10, 2),
        Hand(("c", "b"), 40, 2),
        Hand((), 0, 2),
    ]
    cosines = expected_cosines(hands, kind)
    assert cosines["a"] == pytest.approx(of_one_client(30, 4, kind))
    # b: two thirds of the weight with a, one third with c; independent frames add up.
    noise = (2 / 3) ** 2 * RELATIVE_NOISE[kind](30, 4) + (1 / 3) ** 2 * RELATIVE_NOISE[kind](40, 2)
    assert cosines["b"] == pytest.approx((1 + noise) ** -0.5)
    noise = (RELATIVE_NOISE[kind](10, 2) + RELATIVE_NOISE[kind](40, 2)) / 4
    assert cosines["c"] == pytest.approx((1 + noise) ** -0.5)
    assert cosines.keys() == {"a", "b", "c"}


@pytest.mark.parametrize("examples", [(4, 4), (3, 1, 8, 4)])
def test_signal_and_noise_of_a_mean_are_unbiased(examples: tuple[int, ...]) -> None:
    """Known mean and covariance, estimated from the clients of one round, many times over."""
    signal = {"w": torch.linspace(-1, 1, 6).view(2, 3), "b": torch.full((4,), 0.5)}
    spread = {"w": torch.linspace(0.1, 3, 6).view(2, 3), "b": torch.full((4,), 2.0)}
    drawn, found = generator(), []
    for _ in range(DRAWS):
        changes = [
            ({n: value + spread[n] * torch.randn(value.shape, generator=drawn) for n, value in signal.items()}, weight)
            for weight in examples
        ]
        found.append(measured_noise(changes, {"unit": ("w", "b")}, {})["unit"])
    parts = sum(weight**2 for weight in examples) / sum(examples) ** 2
    variance = sum(float(value.square().sum()) for value in spread.values())
    assert within_five_errors(torch.tensor([n.noise for n in found]), parts * variance)
    length = sum(float(value.square().sum()) for value in signal.values())
    assert within_five_errors(torch.tensor([n.signal for n in found]), length)
    assert any(n.signal < 0 and n.cosine == 0.0 for n in found) or length > parts * variance


def test_one_estimate_is_divided_by_theory_or_not_at_all() -> None:
    changes = [({"a": torch.full((4,), 3.0)}, 8)]
    noise = measured_noise(changes, {"a": ("a",), "gone": ("x",)}, {"a": 0.6})
    assert noise.keys() == {"a"}
    assert noise["a"].signal == pytest.approx(36 * 0.36) and noise["a"].noise == pytest.approx(36 * 0.64)
    assert noise["a"].cosine == pytest.approx(0.6)
    assert measured_noise(changes, {"a": ("a",)}, {}) == {}


def test_parts_of_one_frame_are_one_estimate_and_an_exact_head_is_apart() -> None:
    """Across parts of a frame there is nothing to measure: orthogonal clients differ even where the mean is exact."""
    adapter, head = torch.eye(2), torch.ones(2)
    changes = [({"a": 2 * adapter[i], "h": head * (1 + i)}, 8) for i in range(2)]
    units = {"a": ("a",), "h": ("h",)}
    noise = measured_noise(changes, units, {"a": 1.0}, apart={"h"})
    assert noise["a"] == Noise(1, 2.0, 0.0) and noise["a"].signal_to_noise == math.inf
    assert noise["h"].estimates == 2
    other = measured_noise([*changes, ({"a": head, "b": head}, 16)], units, {"a": 1.0}, apart={"h"})
    assert other["a"] == Noise(2, 2.0, 0.0)  # a client with other tensors has a frame of its own
    assert measured_noise(changes, units, {})["a"].estimates == 2


def test_units_add_up() -> None:
    assert overall([Noise(3, 1.0, 2.0), Noise(2, 3.0, 2.0)]) == Noise(2, 4.0, 4.0)
    assert overall([]) is None


@pytest.mark.parametrize("kind", RELATIVE_NOISE)
@pytest.mark.parametrize("target", [0.05, 0.3, 0.6, 1.0])
def test_no_unit_falls_short_with_the_fewest_directions_and_one_fewer_is_not_enough(kind: str, target: float) -> None:
    """Against trying every K in turn; unequal hands, then hands that are alike, where the formula can be inverted."""
    hands = [Hand(("a", "b"), 30, 9), Hand(("a", "b"), 30, 9), Hand(("c",), 10, 9), Hand(("c", "b"), 40, 9)]
    most = 24
    needed, reached = fewest_directions(hands, kind, target, most)
    tried = [expected_cosines([Hand(h.units, h.dimensions, k) for h in hands], kind) for k in range(1, most + 1)]
    for unit, count in needed.items():
        enough = [k for k, cosines in enumerate(tried, 1) if cosines[unit] >= target - 1e-9]
        assert count == min(enough, default=most)
    assert reached == all(cosine >= target - 1e-9 for cosine in tried[-1].values())
    mixed = [Hand(h.units, h.dimensions, max(needed[unit] for unit in h.units)) for h in hands]
    assert not reached or min(expected_cosines(mixed, kind).values()) >= target - 1e-9
    if target < 1:
        total = {"gaussian": target**2 * 31 / (1 - target**2), "orthogonal": target**2 * 30}[kind]
        alike, _ = fewest_directions([Hand(("a",), 30, 1)] * 3, kind, target, most)
        assert alike["a"] == min(most, math.ceil(total / 3 - 1e-9))


def test_mostly_noise_is_said_in_numbers() -> None:
    hands = [Hand(("a",), 9216, 1), *[Hand(("b",), 10, 8)] * 5]
    assert warning(hands).startswith("d=9,216, K=1, 1 of 6 clients a unit: expected cosine 0.01, below 0.1; ")
    enough = math.ceil(1 / MOSTLY_NOISE**2)
    assert warning([Hand(("a",), enough - 1, 1)], "orthogonal") == ""
    assert "more directions" in warning([Hand(("a",), enough + 1, 1)], "orthogonal")
    assert warning([]) == warning([Hand((), 0, 1)]) == ""
