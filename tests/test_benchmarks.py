"""The benchmarks measure what they say, and run where only PyTorch, transformers and PEFT are installed."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from benchmarks import length, step
from benchmarks.measure import Memory, memory, ratio
from benchmarks.packed import StandIn4bit
from benchmarks.targets import Slicing, verdicts
from benchmarks.variants import (
    BACKPROP,
    CHECKPOINTED,
    INFERENCE,
    KEPT,
    OURS,
    PUBLISHED,
    Settings,
    prepare,
    together,
    variants,
)
from spry_app.autodiff.memory import peak_mib

ROOT = Path(__file__).parent.parent
TINY = Settings("tiny", batch=8, length=64, directions=3)
ROWS = (INFERENCE, BACKPROP, CHECKPOINTED, PUBLISHED, OURS, together(3))


def test_a_step_runs_without_flower_and_without_bitsandbytes() -> None:
    shape = ["--bits", "4", "--layers", "1", "--length", "16", "--batch", "1", "--directions", "2"]
    arguments = ["--model", "tiny", *shape, "--device", "meta", "--json"]
    code = (
        "import sys, runpy; sys.modules['flwr'] = sys.modules['bitsandbytes'] = None; "
        f"sys.argv[1:] = {arguments}; runpy.run_module('benchmarks.step', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert {"question", "settings", "facts", "figures", "answer"} <= told.keys()
    for slicing in told["figures"].values():
        assert all(figure["activations"] > 0 for figure in slicing["memory"].values()), slicing


def test_the_first_line_asks_and_the_last_one_answers(capsys: pytest.CaptureFixture[str]) -> None:
    step.main(["--model", "tiny", "--batch", "2", "--length", "8", "--rounds", "2", "--no-memory"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("What does one step cost")
    assert lines[-1].startswith("Answer: time, all units, ratio to backprop: ")
    assert "not measured" in lines[-1]  # memory


def test_memory_against_length_and_depth_is_drawn_and_answered(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    length.main(["--model", "tiny", "--lengths", "16", "32", "--picture", str(tmp_path / "curves.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("How does the memory") and lines[-1].startswith("Answer: ")
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ROWS)
def test_a_step_without_data_takes_the_memory_of_the_real_one(name: str) -> None:
    """Nothing differs but that the CPU leaves trained tensors where they are, and gives attention 40 KiB of scratch."""
    real, counted = (
        peak_mib(prepare(settings).run(variants(settings)[name], micro_batch=4), settings.device)
        for settings in (TINY, dataclasses.replace(TINY, device="meta"))
    )
    assert counted == pytest.approx(real, rel=0.02, abs=0.04)


def test_a_figure_from_a_process_of_its_own_is_that_of_the_step() -> None:
    work = prepare(TINY)
    found = memory(TINY, OURS, micro_batch=0)
    assert found.activations == pytest.approx(peak_mib(work.run(variants(TINY)[OURS], 0), "cpu"), rel=0.02)
    assert found.weights == work.weights_mib
    if sys.platform == "linux":
        assert found.resident is not None and 0 < found.resident < 100


def test_all_ways_measure_the_same_gradient() -> None:
    work = prepare(dataclasses.replace(TINY, units="top"))
    rows = variants(dataclasses.replace(TINY, units="top", directions=1))
    exact, again, ours, kept = (
        work.run(rows[name], 2)().gradient  # type: ignore[attr-defined]
        for name in (BACKPROP, CHECKPOINTED, OURS, KEPT)
    )
    published = work.run(rows[PUBLISHED], 2)()
    for name in exact:
        torch.testing.assert_close(again[name], exact[name])
        torch.testing.assert_close(published[name], ours[name], rtol=1e-3, atol=1e-6)  # type: ignore[index]
        torch.testing.assert_close(kept[name], ours[name], rtol=1e-3, atol=1e-6)


def test_targets_are_held_against_the_figures_by_hand() -> None:
    whole = Slicing(
        {INFERENCE: [1.0, 1.0, 2.0], BACKPROP: [2.0, 3.0, 6.0], OURS: [1.9, 2.1, 3.0]},
        {},
        {INFERENCE: Memory(10.0), OURS: Memory(25.0), CHECKPOINTED: Memory(30.0)},
    )
    sliced = Slicing({}, {}, {OURS: Memory(3.0), CHECKPOINTED: Memory(6.0)})
    found = {verdict.name: (verdict.reached, verdict.met) for verdict in verdicts(Settings("tiny"), whole, sliced)}
    assert ratio([1.9, 2.1, 3.0], [2.0, 3.0, 6.0]) == pytest.approx(0.7)  # of 0.95, 0.7, 0.5
    assert found == {
        "time, all units, ratio to backprop": (pytest.approx(0.7), True),
        "time, all units, ratio to inference": (pytest.approx(1.9), True),  # of 1.9, 2.1, 1.5
        "activations, whole batch, ratio to inference": (2.5, False),
        "activations, micro-batch 1, ratio to inference of the whole batch": (pytest.approx(0.3), True),
        "activations, micro-batch 1, checkpointed backprop's over ours": (2.0, True),
    }


def test_the_stand_in_for_4_bit_is_a_linear_layer_in_both_modes() -> None:
    draw = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (64 * 16 // 2, 1), generator=draw, dtype=torch.uint8)
    layer = StandIn4bit(nn.Linear(64, 16), packed, torch.rand(64 * 16 // 64, generator=draw))
    dense = layer.dense_weight(torch.float32)
    assert dense.shape == (16, 64) and dense.unique().numel() > 16
    x, v = torch.randn(2, 5, 64, generator=draw)
    x.requires_grad_(True)
    (ours,), (plain,) = (torch.autograd.grad(y.square().sum(), x) for y in (layer(x), F.linear(x, dense, layer.bias)))
    torch.testing.assert_close(ours, plain)
    with forward_ad.dual_level(), torch.no_grad():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x.detach(), v))).tangent
    torch.testing.assert_close(tangent, F.linear(v, dense))
