"""A run that reaches a limit ends in good order: as the shorter run would have, evaluated, saved, and saying why."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from federation import Federation, make_rows, same, tiny_run
from flwr.app import Context, RecordDict
from rich.console import Console
from safetensors.torch import load_file

from benchmarks.local_grid import LocalGrid
from spry_app.config import StopConfig
from spry_app.launcher.progress import summary
from spry_app.server.record import Round
from spry_app.server.run import run
from spry_app.server.stopping import LIMITS, Stopped, reached

CLIENTS = 3
Outcome = tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]
"""result.json, the lines of metrics.jsonl and the adapter's tensors."""


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    keys = {"client.local-steps": 1, "num-server-rounds": 4, "server.evaluate-every": 9}
    return tiny_run(folder) | keys | {"data.test": str(make_rows(folder / "test.jsonl", 16, offset=500))}


def result_of(run_config: dict[str, Any], folder: Path) -> Outcome:
    config = run_config | {"output-dir": str(folder)}
    context = Context(run_id=7, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    run(LocalGrid(CLIENTS, config), context)  # type: ignore[arg-type]
    result = json.loads((folder / "7" / "result.json").read_text())
    lines = [json.loads(line) for line in Path(result["metrics"]).read_text().splitlines()]
    return result, lines, load_file(folder / "7" / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def two_rounds(run_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return result_of(run_config | {"num-server-rounds": 2}, tmp_path_factory.mktemp("shorter"))


@pytest.mark.parametrize("key", ["max-mib-up", "max-mib-down", "max-forwards"])
def test_a_run_that_reaches_a_limit_is_the_shorter_run(
    key: str, run_config: dict, two_rounds: Outcome, tmp_path: Path
) -> None:
    """The limit lies between what is spent after one round and after two."""
    shorter, spent, adapter = two_rounds
    name = key.removeprefix("max-")
    limit = (spent[1][name] + spent[2][name]) / 2
    result, lines, ended = result_of(run_config | {f"stop.{key}": limit}, tmp_path)
    assert result["stopped"] == f"{key} {limit:g} reached in round 2"
    assert shorter["stopped"] is None
    assert result["rounds"] == len(lines) - 1 == 2
    assert lines[-1]["accuracy"] == spent[-1]["accuracy"] == result["accuracy-after"] is not None
    assert same(ended, adapter)


@pytest.mark.slow
def test_a_target_ends_the_run_in_the_round_that_reaches_it(run_config: dict, tmp_path: Path) -> None:
    keys = {"server.evaluate-every": 1, "client.learning-rate": 0.2, "client.local-steps": 4, "method": "fedavg"}
    keys |= {"num-server-rounds": 8}
    _, lines, _ = result_of(run_config | keys, tmp_path / "all")
    target = max(line["accuracy"] for line in lines)
    first = next(line["round"] for line in lines if line["accuracy"] >= target)
    assert 0 < first < 8
    result, lines, _ = result_of(run_config | keys | {"stop.target-accuracy": target}, tmp_path / "target")
    assert result["stopped"] == f"target-accuracy {target:g} reached in round {first}"
    assert lines[-1]["accuracy"] == result["accuracy-after"] == target


def test_no_time_at_all_ends_the_run_before_its_first_round(run_config: dict, tmp_path: Path) -> None:
    result, lines, _ = result_of(run_config | {"stop.max-seconds": 1e-9}, tmp_path)
    assert result["rounds"] == 0 and len(lines) == 1
    assert result["stopped"] == "max-seconds 1e-09 reached in round 0"


def test_clients_evaluate_the_round_that_a_limit_makes_the_last(run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config | {"data.test": "", "stop.max-forwards": 1.0})
    with pytest.raises(Stopped, match="max-forwards 1 reached in round 1") as stopped:
        federation.start(CLIENTS)
    last = federation.recorder.rounds[-1]
    assert last.round == 1 and last.accuracy is not None
    assert same(dict(stopped.value.arrays.to_torch_state_dict()), federation.strategy.snapshot())


@pytest.mark.parametrize("key", LIMITS)
def test_each_limit_is_on_its_own_number_and_zero_is_none(key: str) -> None:
    spent = {"mib_up": 0.5, "mib_down": 0.5, "forwards": 0.5, "seconds": 0.5, "accuracy": 0.5}
    now = Round(3, 9, **spent)
    name = key.replace("-", "_")
    assert reached(StopConfig(), now) == ""
    assert reached(StopConfig(**{name: 0.5}), now) == f"{key} 0.5 reached in round 3"
    assert reached(StopConfig(**{name: math.nextafter(0.5, 1)}), now) == ""
    number = key.removeprefix("max-").removeprefix("target-").replace("-", "_")
    others = Round(3, 9, **{other: 1.0 for other in spent if other != number} | {number: 0.25})
    assert reached(StopConfig(**{name: 0.5}), others) == ""


def test_the_closing_table_says_why_a_run_ended_early(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = {"accuracy-before": 0.1, "accuracy-after": 0.8, "peak-mib": None, "peak-mib-backprop": None}
    result |= {"rounds": 12, "seconds": 65.0, "stopped": "target-accuracy 0.8 reached in round 12"}
    Console().print(summary(result, tmp_path))
    shown = capsys.readouterr().out
    assert "target-accuracy 0.8 reached in round 12" in shown and "10.0% before, 80.0% after" in shown
    assert "not measured with backprop" in shown
    Console().print(summary(result | {"stopped": None}, tmp_path))
    assert "ended" not in capsys.readouterr().out
