"""The cheap drills, as `make test-deploy` runs them with all others; and that nothing of them is left."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_federation_outlives_workers_that_die_or_are_slow_or_without_memory(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "drills.py"), "--only", "worker", "memory", "partial"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith(("| worker ", "| a node "))]
    faults = ["worker killed in training", "worker out of memory", "a node slower than client.deadline-s (20 s)"]
    assert [row[0] for row in rows] == [f"| {fault}" for fault in faults]
    assert "1 of 2 answer in round 2 (“The worker of this node (process " in rows[0][1]
    assert "2 of 2 answer in round 2, with " in rows[2][1]
    assert [row[-1] for row in rows] == ["0 |"] * 3  # rounds lost
