"""Replies of unequal precision in one mean: the formulas against estimates that were drawn, with known gradients."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, same, tiny_run

from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import METHODS, get_method
from spry_app.methods.global_state import mean_change
from spry_app.methods.noise import Hand, measured_noise, relative_noise
from spry_app.methods.precision import LEAST, MOST, SINGLE, Spread, relative_variance, spread
from spry_app.server.combining import ByPrecision

D, B, STEPS, SINGLES, ROUNDS = 20, 4, 2, 30.0, 3000
UNITS = {"unit": ("w",), "head": ("h",)}
G = torch.linspace(-1, 2, D, dtype=torch.float64)


def within_five_errors(drawn: torch.Tensor, expected: float) -> bool:
    return abs(float(drawn.mean()) - expected) <= 5 * float(drawn.std()) / len(drawn) ** 0.5


def estimates(directions: int, draws: int, steps: int, seed: int, kind: str = "gaussian") -> torch.Tensor:
    """Means of `steps` batches, shape (draws, D); 0 directions: of exact gradients."""
    drawn = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=drawn, dtype=torch.float64)

    of_one = math.sqrt(SINGLES * float(G.square().sum()) / D)
    batches = G + normal(draws, steps, B, D).mean(2) * of_one
    if directions:
        v = normal(draws, steps, directions, D)
        if kind == "orthogonal":
            v = torch.linalg.qr(normal(draws, steps, D, D)).Q.mT[:, :, :directions] * math.sqrt(D)
        batches = ((v @ batches[..., None]) * v).mean(2)
    return batches.mean(1)


@pytest.mark.parametrize(
    ("directions", "kind"), [(0, "gaussian"), (1, "gaussian"), (16, "gaussian"), (5, "orthogonal")]
)
def test_the_variance_is_that_of_drawn_estimates(directions: int, kind: str) -> None:
    errors = (estimates(directions, ROUNDS, STEPS, 1, kind) - G).square().sum(1)
    noise = relative_noise(D if directions else 0, directions, kind)
    expected = float(G.square().sum()) / (B * STEPS) * relative_variance(noise, B, SINGLES)
    assert within_five_errors(errors, expected)


@pytest.mark.parametrize("directions", [0, 16])
def test_what_a_round_tells_of_single_gradients_is_unbiased(directions: int) -> None:
    """Three clients of 1, 2 and 3 batches."""
    drawn = [estimates(directions, ROUNDS, steps, steps) for steps in (1, 2, 3)]
    noise = relative_noise(D if directions else 0, directions, "gaussian")
    found = [spread(list(of_round), [B, 2 * B, 3 * B], noise, B) for of_round in zip(*drawn, strict=True)]
    length = float(G.square().sum())
    assert within_five_errors(torch.tensor([one.signal for one in found]), length)
    assert within_five_errors(torch.tensor([one.noise for one in found]), SINGLES * length)


def test_what_is_known_of_single_gradients_stays_within_reason() -> None:
    assert Spread().single == SINGLE and Spread().after([]) == Spread()
    assert Spread(3.0, 0.1).single == pytest.approx(30.0)
    assert Spread(3.0, -0.1).single == MOST and Spread(-3.0, 1.0).single == LEAST
    assert Spread(1.0, 1.0).after([Spread(2.0, 3.0), Spread(1.0, 1.0)]) == Spread(0.9 + 3.0, 0.9 + 4.0)


def weighting() -> ByPrecision:
    config = RunConfig.from_flower({"method": "spry", "client.batch-size": B, "server.weighting": "precision"})
    return ByPrecision(config, get_method(config), UNITS)


def test_a_mixed_fleet_is_better_than_its_parts_and_than_a_mean_by_examples_and_unbiased() -> None:
    """Two clients with exact gradients, one with 16 directions, one with 1, over rounds that learn as they go."""
    kinds, examples = (0, 0, 16, 1), B * STEPS
    drawn = [estimates(directions, ROUNDS, STEPS, 10 + i) for i, directions in enumerate(kinds)]
    hands = [Hand(("unit",), D if directions else 0, max(1, directions), examples) for directions in kinds]
    by_precision, found, noises = weighting(), [], []
    for of_round in zip(*drawn, strict=True):
        weigh = by_precision.weigh(hands)
        changes = [({"w": one}, examples) for one in of_round]
        found.append(mean_change((change, weigh("unit", i)[0]) for i, (change, _) in enumerate(changes))["w"])
        noises.append(measured_noise(changes, {"unit": ("w",)}, {}, weigh=weigh)["unit"])
        by_precision.learn(hands, changes)
    combined = torch.stack(found)
    exact, many, one = torch.stack(drawn[:2]).mean(0), drawn[2], drawn[3]
    errors = (combined - G).square().sum(1)
    for other in (exact, many, one, torch.stack(drawn).mean(0)):
        less = (other - G).square().sum(1) - errors
        assert float(less.mean()) > 5 * float(less.std()) / ROUNDS**0.5
    for coordinate in range(D):
        assert within_five_errors(combined[:, coordinate], float(G[coordinate]))
    assert by_precision._spread.single == pytest.approx(SINGLES, rel=0.5)
    best = 1 / sum(
        1 / relative_variance(relative_noise(h.dimensions, h.directions, "gaussian"), B, SINGLES) for h in hands
    )
    length = float(G.square().sum())
    assert float(errors.mean()) == pytest.approx(best * length / examples, rel=0.05)
    assert within_five_errors(torch.tensor([n.signal for n in noises]), length)
    assert float(torch.tensor([n.noise for n in noises]).mean()) == pytest.approx(float(errors.mean()), rel=0.05)


def test_only_holders_of_a_perturbed_unit_that_differ_weigh_anything_else_than_examples() -> None:
    hands = [Hand(("unit",), D, 1, 7), Hand(("unit", "head"), 0, 1, 3), Hand((), 0, 1, 5)]
    weigh = weighting().weigh(hands)
    assert weigh("unit", 1)[0] == 3
    assert weigh("unit", 0)[0] == pytest.approx(7 * SINGLE / relative_variance((D + 1) / 1, B, SINGLE))
    assert [weigh("head", client) for client in range(3)] == [(7, 1.0), (3, 1.0), (5, 1.0)]
    alike = weighting().weigh([Hand(("unit",), D, 2, n) for n in (7, 3, 5)])
    assert [alike("unit", client) for client in range(3)] == [(7, 1.0), (3, 1.0), (5, 1.0)]


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    keys = {"server.fraction-evaluate": 0.0, "server.evaluate-every": 100}
    return tiny_run(tmp_path_factory.mktemp("tiny")) | keys


@pytest.mark.parametrize(
    ("method", "keys"),
    [("spry", {"assign": "every-unit", "noise.scale-step": True}), ("fedavg", {}), ("fedsgd", {})],
)
def test_clients_of_one_kind_give_the_mean_by_examples_to_the_bit(
    method: str, keys: dict, run_config: dict, tmp_path: Path
) -> None:
    """Shards of unequal sizes, whole epochs."""
    keys = {"method": method, **keys, "data.partition": "natural", "data.natural-field": "user"}
    results, lines = [], []
    for kind in ("examples", "precision"):
        federation = Federation(
            tmp_path / kind, run_config | keys | {"server.weighting": kind, "client.local-steps": 0}
        )
        federation.start(3)
        results.append(federation.strategy.snapshot())
        lines.append([line.noise for line in federation.recorder.rounds])
    assert same(*results) and lines[0] == lines[1]
    assert bool(federation.strategy.checkpoint().weighting["spread"].count_nonzero()) == (method == "spry")


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.reply == "slopes"])
def test_whoever_rebuilds_steps_could_not_know_the_weights(method: str) -> None:
    with pytest.raises(SpryError, match=r"server\.weighting='precision': clients of method=.*reply with slopes"):
        get_method(RunConfig.from_flower({"method": method, "server.weighting": "precision"}))


@pytest.mark.parametrize(("mode", "unit"), [("central", "client"), ("local", "client"), ("local", "example")])
def test_privacy_has_one_vote_a_client(mode: str, unit: str) -> None:
    keys = {"method": "spry", "server.weighting": "precision", "privacy.mode": mode, "privacy.unit": unit}
    with pytest.raises(SpryError, match=rf"server\.weighting='precision': with privacy\.mode='{mode}'"):
        get_method(RunConfig.from_flower(keys))
