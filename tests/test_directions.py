"""Directions are N(0, I), are the same bits everywhere, and never shared by accident."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri

from spry_app.autodiff import gaussian
from spry_app.autodiff.directions import Seed, direction, weighted_sum

SEED = Seed(run=1, round=2, client=3, step=4)


def _one(seed: Seed = SEED, k: int = 0, name: str = "a", shape: tuple[int, ...] = (64,)) -> torch.Tensor:
    return direction(seed, k, {name: torch.empty(shape)})[name]


def test_the_bits_of_a_direction_never_change() -> None:
    """Client and server may run different releases on different processors; these bits are the contract."""
    bits = [np.frombuffer(_one(name="lora_A", shape=(2, 2)).numpy().tobytes(), "<u4").tolist()]
    bits.append(np.frombuffer(_one(Seed(2**62, 1, 2**63, 0), 7, "head", (3,)).numpy().tobytes(), "<u4").tolist())
    assert bits == GOLDEN


def test_a_direction_is_fp32_on_the_cpu_whatever_the_parameter() -> None:
    v = direction(SEED, 0, {"a": torch.empty(3, 5, dtype=torch.bfloat16), "b": torch.empty((), dtype=torch.float64)})
    assert {name: (t.dtype, t.shape, t.device.type) for name, t in v.items()} == {
        "a": (torch.float32, (3, 5), "cpu"),
        "b": (torch.float32, (), "cpu"),
    }


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (15,), (16,), (2, 3), (1, 1, 1)])
def test_tiny_shapes_start_like_long_ones(shape: tuple[int, ...]) -> None:
    short = _one(shape=shape)
    assert short.shape == shape
    assert torch.equal(short.flatten(), _one(shape=(1000,))[: short.numel()])


def test_chunks_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _one(shape=(1000,))
    monkeypatch.setattr(gaussian, "CHUNK", 7)
    assert torch.equal(_one(shape=(1000,)), whole)


def test_every_coordinate_gives_another_direction() -> None:
    """Published mistakes: the same v for all K directions, same-shaped tensors sharing one v."""
    seeds = [SEED, Seed(9, 2, 3, 4), Seed(1, 9, 3, 4), Seed(1, 2, 9, 4), Seed(1, 2, 3, 9), Seed(2, 1, 3, 4)]
    drawn = [_one(seed) for seed in seeds] + [_one(k=1), _one(k=2), _one(name="b"), _one(name="a ")]
    # Digits must not run into one another: (1, 12) is not (11, 2).
    drawn += [_one(Seed(1, 12, 0, 0)), _one(Seed(11, 2, 0, 0)), _one(k=1, name="1 a"), _one(k=11, name=" a")]
    values = torch.stack(drawn)
    assert len(values.flatten().unique()) == values.numel()


def test_a_tensor_does_not_depend_on_its_companions() -> None:
    many = {name: torch.empty(8) for name in "abcd"}
    assert torch.equal(direction(SEED, 0, many)["c"], direction(SEED, 0, {"c": torch.empty(8)})["c"])
    alone = weighted_sum([0.5, -2.0], SEED, {"c": torch.empty(8)})["c"]
    assert torch.equal(weighted_sum([0.5, -2.0], SEED, many)["c"], alone)


def test_moments_are_those_of_independent_standard_normals() -> None:
    """Within 5 standard errors; those of the means of x, x^2, x^3, x^4 are sqrt(1 / n, 2 / n, 15 / n, 96 / n)."""
    n = 400_000
    x = _one(shape=(n,)).double()
    for power, (expected, deviation) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs((x**power).mean().item() - expected) < 5 * (deviation / n) ** 0.5
    others = [x.roll(1), _one(k=1, shape=(n,)), _one(name="b", shape=(n,)), _one(Seed(1, 2, 3, 5), shape=(n,))]
    for other in others:
        assert abs((x * other).mean().item()) < 5 / n**0.5
        assert abs((x.square() * other.square()).mean().item() - 1) < 5 * (8 / n) ** 0.5
    inside = [(x.abs() < limit).double().mean().item() for limit in (0.1, 1, 2, 3)]
    for got, p in zip(inside, (0.0796557, 0.6826895, 0.9544997, 0.9973002), strict=True):
        assert abs(got - p) < 5 * (p * (1 - p) / n) ** 0.5


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30))
def test_words_become_normals_by_the_inverse_of_their_distribution(words: list[int]) -> None:
    got = gaussian._words_to_normals(np.array(words, np.uint64))
    want = ndtri((np.array([word >> 12 for word in words], np.float64) + 0.5) * 2.0**-52)
    np.testing.assert_allclose(got, want, rtol=2e-7)


def test_the_extreme_words_are_finite_and_symmetric() -> None:
    low, middle, high = gaussian._words_to_normals(np.array([0, 2**63, 2**64 - 1], np.uint64))
    assert low == -high
    assert 8.2 < high < 8.22  # the normal quantile of 1 - 2^-53 is 8.2095
    assert 0 < middle < 1e-15


def test_the_tail_of_the_tail_is_right() -> None:
    """Below 2^-36 the third polynomial takes over; no random test would meet it."""
    words = np.array([(2**cell) << 12 for cell in range(20)], np.uint64)
    want = ndtri((np.array([2.0**cell for cell in range(20)]) + 0.5) * 2.0**-52)
    np.testing.assert_allclose(gaussian._words_to_normals(words), want, rtol=2e-7)


def test_the_logarithm_is_right_to_the_last_digits() -> None:
    x = np.concatenate([2.0 ** -np.arange(1, 54), np.linspace(1e-9, 0.5, 1001)])
    np.testing.assert_allclose(gaussian._log(x), np.log(x), rtol=1e-15)


def test_the_weighted_sum_is_the_mean_of_slope_times_direction() -> None:
    like = {"a": torch.empty(3, 4), "b": torch.empty(())}
    slopes = [0.25, -3.0, 7.5]
    got = weighted_sum(slopes, SEED, like)
    for name in like:
        want = sum(s * direction(SEED, k, like)[name].double() for k, s in enumerate(slopes)) / 3
        torch.testing.assert_close(got[name], want.float(), rtol=1e-6, atol=1e-6)


def test_the_weighted_sum_rounds_every_product_and_every_sum() -> None:
    """A fused multiply-add rounds once and would differ from machine to machine."""
    slopes = [1 / 3, -2 / 7]
    first, second = (direction(SEED, k, {"a": torch.empty(5000)})["a"].numpy() for k in (0, 1))
    products = first * np.float32(slopes[0]), second * np.float32(slopes[1])
    want = (products[0] + products[1]) / np.float32(2)
    assert np.array_equal(weighted_sum(slopes, SEED, {"a": torch.empty(5000)})["a"].numpy(), want)
    fused = first.astype(np.float64) * np.float32(slopes[0]) + products[1]
    assert not np.array_equal((fused.astype(np.float32) / np.float32(2)), want)


def test_no_slopes_is_an_error_not_a_zero_gradient() -> None:
    with pytest.raises(ValueError, match="at least one"):
        weighted_sum([], SEED, {"a": torch.empty(3)})


GOLDEN = [[3194501745, 1036056087, 3221609001, 1032096522], [1048723961, 1077200285, 3219316122]]
