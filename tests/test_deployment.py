"""The same app on a real SuperLink with two SuperNodes, each with data of its own, through deploy/loopback.py."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from federation import DEPLOYED, make_checkpoint, make_rows
from left_running import left_running
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent


@pytest.fixture
def temporary() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def deploy(
    folder: Path, temporary: Path, files: list[Path], *options: str, **settings: object
) -> subprocess.CompletedProcess[str]:
    """Run deploy/loopback.py to its end in `folder`, which holds the checkpoint and the test rows."""
    keys = DEPLOYED | {"model.name": str(folder / "tiny"), "data.source": str(files[0])} | settings
    run_config = " ".join(f"{key}={json.dumps(value)}" for key, value in keys.items())
    return subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "loopback.py"), *map(str, files), "--run-config", run_config, *options],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_two_nodes_with_data_of_their_own_train_one_model(tmp_path: Path, temporary: Path) -> None:
    make_checkpoint(tmp_path / "tiny")
    files = [make_rows(tmp_path / f"node-{node}.jsonl", 64, offset=1000 * node) for node in range(2)]
    test = make_rows(tmp_path / "test.jsonl", 40, offset=5000)
    settings = {"data.test": str(test), "assign": "by-depth"}
    done = deploy(tmp_path, temporary, files, "--memory-mib", "4000", "64", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Stopped 2 workers" in done.stdout  # every message of a node went to one
    (run,) = (tmp_path / "outputs").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert result["accuracy-after"] > max(0.8, result["accuracy-before"])
    *_, before, last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (last["asked"], last["answered"], last["refused"]) == (2, 2, 0)
    # The second message brings the head and the scalars of the first round: each comes to a new process, and what the
    # node has learned before is with its SuperNode.
    head = sum(4 * value.numel() for value in load_file(run / "exact.safetensors").values())
    scalars = 2 * 4 * 32 * 8
    assert 2 * (head + scalars) < (last["mib-down"] - before["mib-down"]) * 2**20 < 2 * (head + scalars + 1500)
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert left_running(temporary) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_a_failed_deployment_exits_with_1_and_says_why(tmp_path: Path, temporary: Path) -> None:
    """Both nodes refuse their file: it has no such label field."""
    make_checkpoint(tmp_path / "tiny")
    files = [make_rows(tmp_path / f"node-{node}.jsonl", 64, offset=1000 * node) for node in range(2)]
    test = make_rows(tmp_path / "test.jsonl", 40, offset=5000)
    done = deploy(tmp_path, temporary, files, **{"data.test": str(test), "data.text-field": "body"})
    assert done.returncode == 1
    assert "body" in done.stderr
    assert left_running(temporary) == []
