"""The benchmark of a message: its processes are real ones, and a warm worker answers without torch in them."""

from pathlib import Path

import pytest

from benchmarks.message import CASES, measure


@pytest.mark.slow
def test_every_kind_of_message_is_answered_and_a_warm_worker_takes_no_memory_of_the_process(tmp_path: Path) -> None:
    found = measure(tmp_path, rounds=1)
    assert found.keys() == CASES.keys()
    assert [len(costs) for costs in found.values()] == [1, 1, 1, 1]
    alone, warm, _, without = (found[name][0].mib for name in CASES)
    assert warm < alone + 40 < without  # of the last, torch and the model
