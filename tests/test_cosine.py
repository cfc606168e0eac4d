"""The benchmark of cosines measures the round that runs, and expects what drawing at random gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import make_checkpoint, make_rows

from benchmarks import cosine
from benchmarks.angles import cosine as angle
from benchmarks.angles import expected_cosine, flat, relative_square, unlikeness
from benchmarks.one_round import Rounds, Seen
from spry_app.protocol import TrainReply

CLIENTS, NUMBERS, DRAWS = 4, 24, 4000


def frames(kind: str, holders: int, directions: int, draw: torch.Generator) -> torch.Tensor:
    """Directions of each holder, (DRAWS, holders, K, d): Gaussian, or columns of one orthogonal matrix dealt out."""
    wide = torch.randn(DRAWS, NUMBERS, NUMBERS, generator=draw, dtype=torch.float64)
    if kind == "gaussian":
        shape = (DRAWS, holders, directions, NUMBERS)
        return torch.randn(shape, generator=draw, dtype=torch.float64)
    columns = torch.linalg.qr(wide).Q * NUMBERS**0.5
    return torch.stack([columns[:, holder * directions : (holder + 1) * directions] for holder in range(holders)], 1)


@pytest.mark.parametrize(
    ("kind", "holders", "directions"),
    [("gaussian", 4, 1), ("gaussian", 1, 3), ("gaussian", 2, 8), ("orthogonal", 4, 1), ("orthogonal", 2, 5),
     ("orthogonal", 4, 6), ("orthogonal", 1, 24), ("orthogonal", 1, 2)],
)  # fmt: skip
def test_the_expected_square_is_that_of_many_draws(kind: str, holders: int, directions: int) -> None:
    """Mean over holders of mean_k (g_i v_k) v_k; which of the clients hold the numbers changes from draw to draw."""
    draw = torch.Generator().manual_seed(1)
    gradients = torch.randn(CLIENTS, NUMBERS, generator=draw, dtype=torch.float64) + 0.5
    mean = gradients.mean(0)
    unlike = (gradients.square().sum(1).mean() / mean.square().sum()).item()
    held = torch.stack([torch.randperm(CLIENTS, generator=draw)[:holders] for _ in range(DRAWS)])
    directions_of = frames(kind, holders, directions, draw)
    slopes = torch.einsum("nhkd,nhd->nhk", directions_of, gradients[held])
    estimates = torch.einsum("nhk,nhkd->nd", slopes, directions_of) / (holders * directions)
    squares = estimates.square().sum(1) / mean.square().sum()
    expected = relative_square(kind, NUMBERS, directions, holders, CLIENTS, unlike)
    error = abs(squares.mean().item() - expected)
    assert error <= 5 * squares.std().item() / DRAWS**0.5 + 1e-9
    assert error < 0.1 * expected


def test_a_full_frame_of_clients_that_are_alike_leaves_no_noise() -> None:
    assert relative_square("orthogonal", 24, 6, 4, 4, unlike=1.0) == 1.0
    assert relative_square("orthogonal", 24, 24, 4, 4, unlike=3.0) == 1.0  # every client measures every number
    assert relative_square("gaussian", 24, 24, 4, 4, unlike=1.0) == 1 + 25 / 96


def test_hands_that_overlap_count_as_holders() -> None:
    """Four clients, of whom two each hold ten numbers: 2 directions and 2 holders, so 1 + 11 / 4."""
    perturbed = [{"a": 10}, {"b": 10}, {"a": 10}, {"b": 10}]
    seen = Seen({}, perturbed, [])
    assert expected_cosine("gaussian", 2, seen, unlike=1.0) == pytest.approx((1 + 11 / 4) ** -0.5)


def test_clients_are_as_unlike_as_their_gradients() -> None:
    gradients = [{"a": torch.tensor([3.0])}, {"a": torch.tensor([1.0])}]
    replies = [TrainReply(gradient, (), 0.0, 1, 0.0, 0.0) for gradient in gradients]
    assert unlikeness(Seen({"a": torch.tensor([2.0])}, [], replies), ["a"]) == 5 / 4


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("cosine")
    return {
        "model.name": str(make_checkpoint(folder / "tiny")),
        "adapter.targets": "1.attention.self.query",
        "data.source": str(make_rows(folder / "rows.jsonl", 32)),
        "data.num-labels": 2,
        "data.partition": "iid",
        "data.holdout": 0.0,
        "client.directions-at-once": 16,
    }


CORE = {"adapter.subspace": "core", "adapter.rank": 8, "adapter.alpha": 8.0, "adapter.frame": "singular"}


@pytest.mark.parametrize("adapter", [{}, CORE], ids=["lora", "core"])
@pytest.mark.parametrize("method", ["spry", "spry-per-iteration"])
def test_as_many_orthogonal_directions_as_numbers_give_the_true_gradient(
    method: str, adapter: dict[str, Any], keys: dict[str, Any], tmp_path: Path
) -> None:
    """Which only comes out if both rounds have the same rows and tensors, and weights and slopes are read rightly."""
    keys = {**keys, **adapter}
    truth = Rounds({**keys, "method": "fedsgd"}, 3, tmp_path / "truth")
    estimate = {"method": method, "assign": "every-unit", "directions": "orthogonal", "client.directions": 64}
    ours = Rounds({**keys, **estimate}, 3, tmp_path / "ours")
    away = {name: value + 0.1 for name, value in truth.start.items()}
    for tensors, round_ in ((truth.start, 1), (away, 2), (away, 7)):
        seen, exact = ours.at(tensors, round_), truth.at(tensors, round_)
        assert [sum(one.values()) for one in seen.perturbed] == [64, 64, 64]
        names = sorted(seen.perturbed[0])
        torch.testing.assert_close(flat(seen.mean, names), flat(exact.mean, names), rtol=1e-3, atol=1e-5)
    assert angle(flat(truth.at(away, 7).mean, names), flat(truth.at(away, 8).mean, names)) < 0.999  # other rows


def test_the_table_stands_beside_the_formulas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path / "tiny")
    (tmp_path / "ag_news").mkdir()
    for name, count in (("train", 64), ("test", 8)):
        make_rows(tmp_path / "ag_news" / f"{name}.jsonl", count)
    sizes = "--data ag_news --adapters lora --directions 4 --clients 3 --rounds 5 --train-rounds 2 --choice-rows 16"
    folders = ["--data-dir", str(tmp_path), "--out", str(tmp_path), "--set", f"model.name={tmp_path / 'tiny'}"]
    cosine.main([*sizes.split(), *folders])
    assert capsys.readouterr().out.splitlines()[0] == cosine.QUESTION
    figures = json.loads((tmp_path / "cosine-ag_news-iid.json").read_text())["figures"]
    assert len(figures) == 2 * 2  # kinds, before and after training
    assert {one["dimension"] for one in figures} == {4 * 64}
    for one in figures:
        assert abs(one["cosine"]["mean"] - one["expected"]["mean"]) < 4 * one["cosine"]["spread"] / 5**0.5 + 0.02
        assert one["expected"]["mean"] < one["alike"]["mean"]


def test_an_unknown_adapter_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"--adapters has 'nothing'; it may have shared 13"):
        cosine.main(["--adapters", "nothing"])
