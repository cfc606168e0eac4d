"""Whole runs with privacy: what they cost, go on with after an end, and end for."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from federation import Federation, make_rows, same, tiny_run
from whole_runs import CLIENTS, end_early, start

from spry_app.errors import SpryError
from spry_app.protocol import from_arrays
from spry_app.server.accountant import Release, epsilon

pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_run(folder) | {"data.test": str(make_rows(folder / "test.jsonl", 16, offset=500))}


@pytest.mark.parametrize(("mode", "method"), [("central", "spry"), ("central", "decomfl"), ("local", "baffle")])
def test_a_resumed_run_has_the_same_bits_and_says_what_it_has_cost(
    mode: str, method: str, run_config: dict, tmp_path: Path
) -> None:
    """Two of three clients a round; killed when round 2 was heard. The key is the run's, so it is copied before.

    Local replies of that round have been sent by then, so it counts twice; a central sum has not.
    """
    keys = {"method": method, "privacy.mode": mode, "server.fraction-train": 0.6, "num-server-rounds": 2}
    run_config = run_config | keys | {"client.local-steps": 1}
    whole = start(run_config, tmp_path / "whole")
    folder = tmp_path / "parts"
    folder.mkdir()
    if mode == "central":
        shutil.copy(tmp_path / "whole" / "noise.key", folder)
        assert (folder / "noise.key").stat().st_mode & 0o777 == 0o600
    end_early(run_config, folder, 2)
    parts = start(run_config, folder, resume=str(folder))
    assert same(from_arrays(whole.arrays), from_arrays(parts.arrays))
    release = Release(CLIENTS, 2) if mode == "central" else Release(2, 2)
    multiplier = 0.5 if method == "spry" else 0.5 / math.sqrt(2)
    for run, asked in ((whole, (1, 2)), (parts, (1, 2 if mode == "central" else 3))):
        lines = [json.loads(line) for line in run.recorder.metrics_path.read_text().splitlines()]
        costs = [epsilon([release] * times, multiplier, 1e-5) for times in asked]
        assert [line["epsilon"] for line in lines] == [None, *costs]
    assert f"epsilon {lines[-1]['epsilon']:.4g} at delta 1e-05 after 2 rounds" in parts.recorder.promised
    if method == "spry":  # another key, other noise
        other = start(run_config, tmp_path / "other")
        assert not same(from_arrays(whole.arrays), from_arrays(other.arrays))


def test_the_run_ends_before_the_round_that_would_cost_too_much(run_config: dict, tmp_path: Path) -> None:
    costs = [epsilon([Release(CLIENTS, CLIENTS)] * rounds, 5.0, 1e-5) for rounds in (1, 2, 3)]
    keys = {"method": "fedavg", "privacy.mode": "central", "privacy.noise-multiplier": 10.0, "num-server-rounds": 9}
    keys["privacy.max-epsilon"] = (costs[1] + costs[2]) / 2
    done = start(run_config, tmp_path / "run", **keys)
    assert [line.epsilon for line in done.recorder.rounds] == [None, *costs[:2]]
    assert done.recorder.rounds[-1].accuracy is not None
    assert done.recorder.stopped.endswith("does not allow another round after 2")
    again = start(run_config, tmp_path / "run", **keys, resume=str(tmp_path / "run"))
    assert [line.round for line in again.recorder.rounds] == [0, 1, 2]
    assert same(from_arrays(again.arrays), from_arrays(done.arrays))
    keys["privacy.max-epsilon"] = costs[0] / 2
    with pytest.raises(
        SpryError, match=r"The first round has an epsilon of .*raise privacy\.noise-multiplier \(now 10\)"
    ):
        start(run_config, tmp_path / "none", **keys)


def test_a_run_that_could_not_say_what_it_costs_does_not_begin(
    run_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(SpryError, match=r"not installed on the server: pip install 'spry\[privacy\]'"):
        Federation(tmp_path, run_config | {"privacy.mode": "local"})
