"""The same slopes on a GPU: exact, in 4 bits, in half precision, and without a wait for the device."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import make_checkpoint, make_rows

from spry_app.autodiff.directions import Seed, direction
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.autodiff.slopes import central_difference, forward_mode
from spry_app.client.node import Node, load_node
from spry_app.config import RunConfig
from spry_app.objectives import batch_of

pytestmark = pytest.mark.gpu
SEED = Seed(0, 0, 0, 0)
ROWS = 6


def node_on(device: str, folder: Path, **keys: Any) -> Node:
    make_checkpoint(folder / "model")
    flat = RunConfig.defaults() | {
        "model.name": str(folder / "model"),
        "model.device": device,
        "data.source": str(make_rows(folder / "rows.jsonl", ROWS)),
        "data.partition": "iid",
        "data.holdout": 0.0,
    }
    config = RunConfig.from_flower(flat | {f"model.{key}": value for key, value in keys.items()})
    return load_node(config, {"partition-id": 0, "num-partitions": 1})


def point(node: Node) -> dict[str, torch.Tensor]:
    """LoRA's B starts at zero, where its A has no slope."""
    drawn = direction(SEED, 99, node.adapted.tensors())
    return {name: value + 0.1 * drawn[name] for name, value in node.adapted.tensors().items()}


def slopes(node: Node, rule: Any = forward_mode, at_once: int = 1) -> list[float]:
    batch = batch_of(node.adapted, node.train, range(ROWS), 4, SEED)
    params = point(node)
    return list(rule(batch, params, [direction(SEED, k, params) for k in range(3)], at_once)[1])


@pytest.mark.parametrize("at_once", [1, 3])
def test_slopes_agree_with_those_of_the_cpu(tmp_path: Path, at_once: int) -> None:
    expected = slopes(node_on("cpu", tmp_path))
    assert slopes(node_on("cuda", tmp_path), at_once=at_once) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_slopes_through_quantised_kernels_agree_with_differences(tmp_path: Path, quantization: str) -> None:
    node = node_on("cuda", tmp_path, quantization=quantization)
    differences = slopes(node, central_difference(1e-2))
    assert slopes(node) == pytest.approx(differences, rel=0.02, abs=1e-3)
    assert slopes(node, at_once=3) == pytest.approx(differences, rel=0.02, abs=1e-3)


@pytest.mark.parametrize(("dtype", "rounding"), [("bfloat16", 0.35), ("float16", 0.1)])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_half_precision_has_slopes_in_full_precision(
    tmp_path: Path, dtype: str, rounding: float, quantization: str
) -> None:
    exact = slopes(node_on("cuda", tmp_path, quantization=quantization))
    half = slopes(node_on("cuda", tmp_path, quantization=quantization, dtype=dtype))
    assert half == pytest.approx(exact, abs=rounding * max(map(abs, exact)))
    assert any(value != float(torch.tensor(value).to(getattr(torch, dtype))) for value in half)


def test_the_gradients_of_backprop_agree_with_slopes(tmp_path: Path) -> None:
    node = node_on("cuda", tmp_path)
    params = point(node)
    batch = batch_of(node.adapted, node.train, range(ROWS), 0, SEED)
    for name in ("backprop", "checkpointed-backprop", "bisected-backprop"):
        gradient = GRADIENTS[name].estimate(batch, params, SEED, 1, 1).gradient
        for k, slope in enumerate(slopes(node)):
            v = direction(SEED, k, params)
            assert sum(float((gradient[n] * v[n]).sum()) for n in v) == pytest.approx(slope, rel=1e-2, abs=1e-4)


def test_a_step_waits_for_the_device_once_and_transformers_once_a_pass(tmp_path: Path) -> None:
    node = node_on("cuda", tmp_path)
    params = point(node)
    directions = [direction(SEED, k, params) for k in range(2)]
    batch = batch_of(node.adapted, node.train, range(ROWS), 3, SEED)
    forward_mode(batch, params, directions)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            forward_mode(batch, params, directions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # transformers asks whether the batch is padded (masking_utils), once for each of two slices and two directions
    assert len([wait for wait in waits if "synchronizing" in str(wait.message)]) <= 1 + 4
