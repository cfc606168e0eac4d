"""Methods are compared fairly: step sizes from training rows alone, readings at equal cost, and nothing lost on the
way.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from federation import make_rows, make_sst2

from benchmarks import accuracy
from benchmarks.ablations import ABLATIONS
from benchmarks.cells import Cell, Cells, Outcome, measure
from benchmarks.curves import Figure, at, budget, figure, taken
from benchmarks.plan import Plan
from benchmarks.rows import data_keys, split
from benchmarks.search import Search, Steps
from benchmarks.summary import summarise
from spry_app.config import RunConfig
from spry_app.data import load_corpus
from spry_app.data.household import utterances
from spry_app.errors import SpryError
from spry_app.methods import get_method


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sst2(tmp_path_factory.mktemp("accuracy"), 16)


@pytest.fixture
def plan(folder: Path, tmp_path: Path) -> Plan:
    shared = {
        "model.name": str(folder / "tiny"),
        "client.optimizer": "adam",
        "client.local-steps": 2,
        "client.directions": 2,
    }
    rows = split("sst2", folder, tmp_path / "rows", train_rows=48, choice_rows=16)
    return Plan(rows, "iid", nodes=4, clients=2, rounds=3, evaluations=1, shared=shared)


def rows_of(*paths: Path) -> list[str]:
    return [line for path in paths for line in path.read_text().splitlines()]


def test_rows_for_step_sizes_come_from_the_training_file_and_are_not_trained_on(folder: Path, plan: Plan) -> None:
    train, choice = rows_of(plan.split.train), rows_of(plan.split.choice)
    assert (len(train), len(choice)) == (48, 16)
    assert all('"train"' in row for row in train + choice)
    whole = rows_of(folder / "sst2" / "train.jsonl")
    assert all(rows.count(row) <= whole.count(row) for rows in (train + choice,) for row in rows)
    assert plan.split.test == folder / "sst2" / "validation.jsonl"


def test_the_embedded_data_set_is_known_like_any_other_and_needs_no_folder(tmp_path: Path) -> None:
    rows = split("household", tmp_path / "absent", tmp_path / "rows", train_rows=48, choice_rows=16)
    train, test = utterances()
    assert [(row["text"], row["label"]) for row in map(json.loads, rows_of(rows.test))] == [
        (row.text, row.label) for row in test
    ]
    known = {(row.text, row.label) for row in train}
    assert {(row["text"], row["label"]) for row in map(json.loads, rows_of(rows.train, rows.choice))} <= known
    keys = RunConfig.defaults() | data_keys(rows, rows.test)
    assert len(load_corpus(RunConfig.from_flower(keys).data).train) == 48


def test_a_folder_of_ones_own_is_compared_like_any_other(folder: Path, tmp_path: Path) -> None:
    """Columns and classes as `spry run` takes them, unless --set says otherwise."""
    (tmp_path / "mine").mkdir()
    for name, count in (("train", 64), ("test", 16)):
        make_rows(tmp_path / "mine" / f"{name}.jsonl", count)
    rows = split("mine", tmp_path, tmp_path / "rows", train_rows=0, choice_rows=16)
    assert (len(rows_of(rows.train)), len(rows_of(rows.choice)), rows.test.name) == (48, 16, "test.jsonl")
    shared = {"model.name": str(folder / "tiny"), "client.local-steps": 1, "data.max-length": 12}
    plan = Plan(rows, "iid", nodes=2, clients=2, rounds=1, evaluations=1, shared=shared)
    found = measure(plan.cell(plan.final({"method": "fedavg"}, 0)))
    assert not found.error and found.last["accuracy"] is not None and found.config["data.max-length"] == 12
    (tmp_path / "mine" / "test.jsonl").unlink()
    with pytest.raises(SpryError, match=r"--data has 'mine'.*household.*folder in --data-dir.*train.jsonl and test"):
        split("mine", tmp_path, tmp_path / "rows", 0, 16)


@pytest.mark.slow
def test_the_search_does_without_the_evaluation_file(plan: Plan, tmp_path: Path) -> None:
    blind = dataclasses.replace(plan, split=dataclasses.replace(plan.split, test=tmp_path / "absent.jsonl"))
    steps = Steps(Cells(tmp_path / "cells", 0, "this"), blind)
    found = steps.find({"fedavg": accuracy.Variant({"method": "fedavg"})})
    assert found["fedavg"].keys() == {"method", "client.learning-rate", "client.head-learning-rate"}
    head, adapter = (one.record() for one in steps.done)
    assert (head["key"], adapter["key"]) == ("client.head-learning-rate", "client.learning-rate")
    for one in (head, adapter):
        best = min(one["tried"], key=lambda tried: tried["loss"])
        assert one["chosen"] == best["value"] and 4 <= len(one["tried"]) <= 6
    assert adapter["chosen"] == found["fedavg"]["client.learning-rate"]


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_was(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--rounds 3 --evaluations 1 --nodes 4 --clients 2 --train-rows 48 --choice-rows 16 --jobs 0 --alpha iid"
    keys = [f"model.name={folder / 'tiny'}", "adapter.targets=", "client.directions=2"]
    arguments = [
        "--data-dir",
        str(folder),
        "--methods",
        "fedavg",
        "--seeds",
        "2",
        "--out",
        str(tmp_path),
        *sizes.split(),
    ]
    arguments += [word for key in keys for word in ("--set", key)]
    accuracy.main(arguments)
    first = capsys.readouterr()
    assert "Runs of the table: 2 runs to do, 0 done before" in first.err
    record = json.loads((tmp_path / "accuracy-sst2-iid.json").read_text())
    assert record["accuracy"]["fedavg"]["generalised at equal rounds"]["count"] == 2
    assert [one["key"] for one in record["search"]] == ["client.head-learning-rate", "client.learning-rate"]
    assert (tmp_path / "accuracy-sst2-iid.png").stat().st_size > 1000
    accuracy.main(arguments)
    again = capsys.readouterr()
    assert again.out == first.out
    assert {line.split(": ")[1].split(",")[0] for line in again.err.splitlines()} == {"0 runs to do"}


def test_a_cell_that_fails_is_told_tried_again_and_stops_no_other(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Cell(plan.final({"method": "fedavg"}, 0), plan.nodes)
    bad = Cell({**good.run_config, "data.source": str(tmp_path / "absent.jsonl")}, plan.nodes)
    cells = Cells(tmp_path / "cells", 0, "this")
    failed, whole = cells.run([bad, good], "First")
    assert "data.source" in failed.error and not failed.curve
    assert whole.curve[-1]["accuracy"] is not None and whole.curve[-1]["forwards"] > 0
    assert cells.run([bad, good], "Again")[1] == whole
    assert "Again: 1 runs to do, 1 done before" in capsys.readouterr().err
    summary = summarise("?", {"bad": [failed], "good": [whole]}, 0.0, 0.0)
    assert summary.errors == {"bad": [failed.error]} and list(summary.accuracy) == ["good"]


@pytest.mark.slow
def test_a_cell_in_a_process_of_its_own_gives_the_same(plan: Plan, tmp_path: Path) -> None:
    cell = Cell(plan.final({"method": "spry"}, 0), plan.nodes)
    cells = Cells(tmp_path / "cells", 1, "this")
    (there,) = cells.run([cell], "One")
    cells.close()
    drop = ("seconds",)
    here = measure(cell)
    assert [{k: v for k, v in line.items() if k not in drop} for line in there.curve] == [
        {k: v for k, v in line.items() if k not in drop} for line in here.curve
    ]


ENDLESS = """
import sys
from pathlib import Path
from benchmarks.cells import Cell, Cells

if __name__ == "__main__":
    folder, model = map(Path, sys.argv[1:])
    keys = {"model.name": str(model), "num-server-rounds": 1_000_000, "data.partition": "iid"}
    Cells(folder, 1, "this").run([Cell(keys, 10)], "A cell without an end")
"""


@pytest.mark.slow
def test_processes_end_with_the_benchmark_that_started_them(folder: Path, tmp_path: Path) -> None:
    """Ended by a signal, it has no time to tell them."""
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    command = [sys.executable, str(script), str(tmp_path / "cells"), str(folder / "tiny")]
    environment = os.environ | {"PYTHONPATH": str(Path(accuracy.__file__).parent.parent)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as started:
        log, patience = tmp_path / "cells" / "log.txt", time.monotonic() + 120
        while not (log.exists() and log.stat().st_size) and time.monotonic() < patience:
            time.sleep(0.2)  # until a process is well into its cell
        begun = psutil.Process(started.pid).children(recursive=True)
        started.kill()
    assert begun
    _, alive = psutil.wait_procs(begun, timeout=30)
    for process in alive:
        process.kill()
    assert not alive


def test_a_cell_is_known_by_what_it_sets() -> None:
    one = Cell({"method": "fedavg", "seed": 1}, 4)
    assert one.name == Cell({"seed": 1, "method": "fedavg", "adapter.rank": 1}, 4).name
    assert len({one.name, Cell({"method": "fedavg", "seed": 2}, 4).name, Cell(one.run_config, 5).name}) == 3


def test_a_method_that_takes_fewer_steps_a_round_gets_more_rounds(plan: Plan) -> None:
    per_epoch, per_iteration = (plan.final({"method": name}, 0) for name in ("spry", "spry-per-iteration"))
    assert (per_epoch["num-server-rounds"], per_epoch["client.local-steps"]) == (3, 2)
    assert (per_iteration["num-server-rounds"], per_iteration["client.local-steps"]) == (6, 1)


def outcome(loss: float) -> Outcome:
    """Two evaluations around `loss`, a round without one, and the model before training, which is not to count."""
    losses = (0.0, loss - 0.1, None, loss + 0.1)
    return Outcome(tuple({"loss": value, "accuracy": 0.5} for value in losses))


@pytest.mark.parametrize(
    ("losses", "tried"),
    [
        (lambda x: (x - 0.3) ** 2, [0.1, 0.3, 0.9, 2.7]),  # the best is inside
        (lambda x: x, [0.00123, 0.0037, 0.0111, 0.0333, 0.1, 0.3, 0.9, 2.7]),  # beyond the lower end, four times
        (lambda x: abs(x - 3), [0.1, 0.3, 0.9, 2.7, 8.1]),  # beyond the upper end: the best is inside then
    ],
)
def test_the_grid_grows_where_its_best_is_at_the_end(losses: Any, tried: list[float]) -> None:
    search = Search("by hand", {}, "client.learning-rate", first=0.1)
    while values := search.pending():
        search.tried |= {value: outcome(losses(value)) for value in values}
    assert sorted(search.tried) == pytest.approx(tried, rel=0.01)
    assert search.best == min(search.tried, key=losses)


def test_of_losses_that_are_alike_the_largest_step_wins() -> None:
    search = Search("by hand", {}, "client.learning-rate", first=0.1)
    search.tried = {0.1: outcome(0.59995), 0.3: outcome(0.6), 0.9: outcome(0.6004), 2.7: outcome(0.7)}
    assert search.best == 0.9 and search.pending() == []
    search.tried[2.7] = outcome(0.6004)
    assert search.best == 2.7 and search.pending() == [8.1]


def test_a_step_size_that_fails_is_the_worst() -> None:
    search = Search("by hand", {}, "client.learning-rate", first=0.1)
    search.tried = {
        0.1: Outcome(error="diverged"),
        0.3: outcome(9.0),
        0.9: outcome(8.0),
        2.7: Outcome(error="diverged"),
    }
    assert search.best == 0.9 and search.pending() == []
    assert search.record()["tried"][1] == {"value": 0.3, "loss": pytest.approx(9.0), "accuracy": 0.5}
    search.tried = {value: Outcome(error="diverged") for value in (0.1, 0.3, 0.9, 2.7)}
    assert search.pending() == []


def curve(*points: tuple[int, float, float, float | None]) -> list[dict[str, Any]]:
    """round, forwards, MiB each way, accuracy"""
    names = ("round", "forwards", "mib-up", "mib-down", "accuracy")
    return [dict(zip(names, (r, f, mib, mib, a), strict=True)) for r, f, mib, a in points]


CHEAP = curve((0, 0, 0, 0.5), (1, 10, 1, None), (2, 20, 2, 0.6), (4, 40, 4, 0.8))
DEAR = curve((0, 0, 0, 0.5), (2, 100, 1, 0.7), (4, 200, 2, 0.9))


def test_curves_are_read_at_equal_cost() -> None:
    assert [budget([CHEAP, DEAR], axis) for axis in ("rounds", "forwards", "MiB")] == [4, 40, 4]
    read = {axis: [at(one, axis, most, "accuracy") for one in (CHEAP, DEAR)] for axis, most in
            (("rounds", 4), ("forwards", 40), ("MiB", 4))}  # fmt: skip
    assert read["rounds"] == [0.8, 0.9]
    assert read["forwards"] == pytest.approx([0.8, 0.58])  # 0.5 + 0.2 * 40 / 100
    assert read["MiB"] == pytest.approx([0.6, 0.9])  # both directions: 2 + 2, at round 2 of the one, 4 of the other
    assert at(CHEAP, "rounds", 100, "accuracy") == 0.8  # never beyond what was measured
    assert at(CHEAP[1:], "rounds", 1, "accuracy") is None


def test_the_cost_of_a_target_is_read_where_the_curve_first_crosses_it() -> None:
    assert taken(CHEAP, "forwards", 0.7) == pytest.approx(30)
    assert taken(DEAR, "forwards", 0.7) == 100
    assert taken(CHEAP, "rounds", 0.9) is None and taken(CHEAP, "rounds", 0.4) == 0


def test_the_spread_is_that_of_the_seeds_which_have_a_value() -> None:
    assert figure([0.6, None, 0.8]) == Figure(pytest.approx(0.7), pytest.approx(0.02**0.5), 2, 3)  # type: ignore[arg-type]
    assert figure([0.6]).spread is None and figure([None]).mean is None


def test_absent_data_is_told_with_the_option_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(SpryError, match=r"--data-dir.*SPRY_DATA"):
        split("rte", tmp_path, tmp_path / "rows", 0, 10)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_variant_of_an_ablation_is_a_run_that_may_start(name: str, plan: Plan) -> None:
    upper = dataclasses.replace(plan, shared={**plan.shared, "adapter.targets": "1.attention.self.query"})
    runs = {told: upper.final(variant.keys, 0) for told, variant in ABLATIONS[name].variants.items()}
    for run_config in runs.values():
        get_method(RunConfig.from_flower(run_config))
    assert len({Cell(run_config, plan.nodes).name for run_config in runs.values()}) == len(runs) > 1
