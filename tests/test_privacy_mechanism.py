"""The bound holds to the bit, the noise is normal and nobody else's, and epsilon is what the literature says it is."""

import math
import multiprocessing
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spry_app.errors import SpryError
from spry_app.privacy import Secret, bounded, noisy
from spry_app.server.accountant import ORDERS, Release, _renyi, epsilon

SECRET = Secret(bytes(range(32)))
DELTA = 1e-5


def normal_cdf(x: float) -> float:
    """The normal distribution function, exact in its tails."""
    return math.erfc(-x / math.sqrt(2)) / 2


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=40), st.floats(1e-3, 1e3))
def test_nothing_is_longer_than_the_bound_though_numbers_are_rounded(numbers: list[float], most: float) -> None:
    values = {"a": torch.tensor(numbers[:1]), "b": torch.tensor(numbers[1:])}
    found = bounded(values, most)
    before, after = (torch.cat([v["a"], v["b"]]).double() for v in (values, found))
    assert float(after.norm()) <= most * (1 + 1e-15)
    if float(before.norm()) <= most:
        assert found is values
    else:
        assert torch.allclose(after, before * (most / before.norm()), rtol=1e-6, atol=1e-37)


def test_words_follow_from_the_key_and_the_coordinates_and_from_nothing_else() -> None:
    words = SECRET.words(4, "x", 12)
    assert np.array_equal(words, Secret(SECRET.key).words(8, "x", 12)[:4])
    others = [
        SECRET.words(4, "x", 1, 2),
        SECRET.words(4, "x1", 2),
        SECRET.words(4, "x"),
        Secret(bytes(32)).words(4, "x"),
    ]
    assert len({tuple(found.tolist()) for found in [words, *others]}) == 5


def test_the_noise_is_standard_normal_by_its_moments_and_its_quantiles() -> None:
    count = 200_000
    draws = np.concatenate([SECRET.normals(count // 4, "draw", number) for number in range(4)])
    assert abs(draws.mean()) < 5 / math.sqrt(count)
    assert abs(draws.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((draws**4).mean() - 3) < 5 * math.sqrt(96 / count)
    for at in (-3.0, -1.5, -0.5, 0.0, 1.0, 2.5):
        part = normal_cdf(at)
        assert abs((draws < at).mean() - part) < 5 * math.sqrt(part * (1 - part) / count)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 5 / math.sqrt(count)


def test_who_asks_again_hears_the_same_and_two_values_never_share_their_noise() -> None:
    values = {"a": torch.zeros(20_000), "b": torch.zeros(5)}
    other = {"a": torch.zeros(20_000), "b": torch.tensor([0.0, 0.0, 0.0, 0.0, 1e-7])}
    first, again, beside = (noisy(v, 1.0, SECRET, "x", 1)["a"] for v in (values, values, other))
    assert torch.equal(first, again)
    unlike = [beside, noisy(values, 1.0, SECRET, "x", 2)["a"], noisy(values, 1.0, Secret(bytes(32)), "x", 1)["a"]]
    for found in unlike:
        assert abs(float(torch.corrcoef(torch.stack([first, found]))[0, 1])) < 5 / math.sqrt(20_000)


def test_each_tensor_has_the_noise_it_is_given() -> None:
    found = noisy({"a": torch.full((40_000,), 2.0), "b": torch.zeros(40_000)}, {"a": 0.5, "b": 3.0}, SECRET, "x")
    for name, mean, std in (("a", 2.0, 0.5), ("b", 0.0, 3.0)):
        assert abs(float(found[name].mean()) - mean) < 5 * std / 200
        assert abs(float(found[name].double().var()) / std**2 - 1) < 5 * math.sqrt(2 / 40_000)


def test_every_node_is_as_likely_at_every_place_of_the_order() -> None:
    nodes, rounds = 5, 5000
    counts = np.zeros((nodes, nodes))
    for round_ in range(rounds):
        order = SECRET.order(nodes, "order", round_)
        assert sorted(order) == list(range(nodes))
        counts[range(nodes), order] += 1
    assert np.abs(counts - rounds / nodes).max() < 5 * math.sqrt(rounds / nodes * (1 - 1 / nodes))


def _key(path: Path) -> bytes:
    return Secret.at(path).key


def test_all_who_come_at_once_find_one_key_that_only_they_may_read(tmp_path: Path) -> None:
    path = tmp_path / "spry" / "noise.key"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        keys = set(pool.map(_key, [path] * 16))
    assert len(keys) == 1
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["noise.key"]
    path.chmod(0o640)
    with pytest.raises(SpryError, match="Others than this user may read"):
        Secret.at(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(SpryError, match="has 5 bytes, not 32"):
        Secret.at(path)


# -- epsilon -----------------------------------------------------------------------------------------------------------


def delta_of(eps: float, multiplier: float) -> float:
    """Of the Gaussian mechanism with sensitivity 1 (arXiv:1805.06530, theorem 8), without its library."""
    half = 1 / (2 * multiplier)
    return normal_cdf(half - eps * multiplier) - math.exp(eps) * normal_cdf(-half - eps * multiplier)


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("rounds", [1, 7])
def test_rounds_of_everybody_cost_what_the_analytic_gaussian_mechanism_costs(multiplier: float, rounds: int) -> None:
    eps = epsilon([Release(10, 10)] * rounds, multiplier, DELTA)
    assert delta_of(eps, multiplier / math.sqrt(rounds)) == pytest.approx(DELTA, rel=1e-6)


def test_one_round_has_the_published_noise() -> None:
    """Balle and Wang's own code: epsilon 1 at delta 1e-5 needs 3.7306 times the sensitivity."""
    assert epsilon([Release(10, 10)], 3.730632, DELTA) == pytest.approx(1.0, abs=1e-6)


def test_the_library_has_the_published_value_of_sampled_rounds() -> None:
    """Abadi et al. (arXiv:1607.00133, section 3.2): q 0.01, sigma 4, 10,000 steps, delta 1e-5 cost epsilon 1.26."""
    orders = range(2, 64)
    accountant = dp_accounting.rdp.RdpAccountant(orders)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(4.0)), 10_000)
    moments = [r + math.log(1 / DELTA) / (a - 1) for a, r in zip(orders, accountant._rdp, strict=True)]
    assert min(moments) == pytest.approx(1.26, abs=0.005)


def bound(order: int, part: float, multiplier: float) -> float:
    """Theorem 9 of arXiv:1808.00087 for a mechanism of which only the divergences are known, by hand."""

    def of(j: int) -> float:
        return j / (2 * multiplier**2)

    terms = [math.comb(order, 2) * part**2 * min(4 * math.expm1(of(2)), 2 * math.exp(of(2)))]
    terms += [math.comb(order, j) * part**j * 2 * math.exp((j - 1) * of(j)) for j in range(3, order + 1)]
    return math.log1p(sum(terms)) / (order - 1)


def divergence(order: int, part: float, multiplier: float, others: float) -> float:
    """Between what a client at one end of the bound and one at the other make of a sampled sum, by quadrature.

    others: where whoever sits in its place is, from -1/2 to 1/2; the ends are 1 apart, which is the sensitivity.
    """
    x = np.linspace(-40 * multiplier, 40 * multiplier, 400_001)

    def density(client: float) -> np.ndarray:
        mixed = (1 - part) * np.exp(-((x - others) ** 2) / (2 * multiplier**2))
        mixed += part * np.exp(-((x - client) ** 2) / (2 * multiplier**2))
        return mixed / (multiplier * math.sqrt(2 * math.pi))

    p, q = density(0.5), density(-0.5)
    inside = q > 1e-290
    ratio = np.exp(order * np.log(p[inside]) + (1 - order) * np.log(q[inside]))
    return float(np.log(ratio.sum() * (x[1] - x[0])) / (order - 1))


@pytest.mark.parametrize(("population", "clients", "multiplier"), [(1000, 10, 0.7), (100, 10, 2.0), (20, 10, 5.0)])
def test_a_sampled_round_costs_no_more_than_the_theorem_and_no_less_than_it_must(
    population: int, clients: int, multiplier: float
) -> None:
    renyi = dict(zip(ORDERS, _renyi(Release(population, clients), multiplier), strict=True))
    for order in (2, 3, 5, 8):
        part = clients / population
        assert renyi[order] <= bound(order, part, multiplier) * (1 + 1e-9)
        for others in (-0.5, 0.0, 0.5):
            assert renyi[order] >= divergence(order, part, multiplier, others)


def test_sampling_helps_and_never_harms_and_rounds_add_up() -> None:
    known, secret = [Release(10, 10)] * 20, [Release(1000, 10)] * 20
    assert epsilon(secret, 1.0, DELTA) < 0.2 * epsilon(known, 1.0, DELTA)
    assert epsilon([Release(11, 10)] * 20, 0.5, DELTA) == epsilon(known, 0.5, DELTA)
    costs = [epsilon(secret[:rounds], 1.0, DELTA) for rounds in range(21)]
    assert costs[0] == 0.0
    assert costs == sorted(costs)
    assert epsilon([*secret, *known], 1.0, DELTA) <= epsilon([*known, *known], 1.0, DELTA)
