"""The benchmark of unequal boxes: budgets that bind, a clock that waits for the slowest, records of who did what."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from federation import make_sst2

from benchmarks import fleet as benchmark
from benchmarks.boxes import EXACT, SLOPES, Box, Fleet, budgets, smallest
from benchmarks.cells import Cell, Outcome, measure
from benchmarks.curves import axes
from benchmarks.large_boxes import HEAD, LARGE, lines, planned
from benchmarks.local_grid import identify
from benchmarks.plan import Plan
from benchmarks.rows import split, with_fewer_tests
from benchmarks.shares import Shares, shares, table
from benchmarks.watched import simulated
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import get_method


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sst2(tmp_path_factory.mktemp("fleet"), 24)


@pytest.fixture(scope="module")
def plan(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    rows = split("sst2", folder, tmp_path_factory.mktemp("rows"), train_rows=60, choice_rows=16)
    shared = {**benchmark.SHARED, "model.name": str(folder / "tiny"), "client.directions": 2}
    return Plan(rows, "1.0", nodes=10, clients=10, rounds=1, evaluations=1, shared=shared)


@pytest.mark.parametrize("name", benchmark.ROWS)
def test_every_row_is_a_run_that_may_start_and_no_other(name: str, plan: Plan) -> None:
    runs = {other: plan.final(row.keys, 0, row.longer) for other, row in benchmark.ROWS.items()}
    method = get_method(RunConfig.from_flower(runs[name]))
    assert method.server_optimizer == "yogi"
    assert [plan.cell(keys).name for keys in runs.values()].count(plan.cell(runs[name]).name) == 1


def test_a_cell_of_unequal_nodes_is_another_than_one_of_equal_ones() -> None:
    keys = {"method": "spry"}
    own = [{"memory-budget-mib": 1.0}, {"memory-budget-mib": 2.0}]
    assert len({Cell(keys, 2, nodes).name for nodes in ((), own, own[::-1])}) == 3


def test_budgets_lie_between_the_steps_that_tell_boxes_apart() -> None:
    """12 is 1.5 times 8; 7 is between 6 and 8, which the server takes for 8.8 to be sure; 5 is between 4 and 6."""
    steps = {(EXACT, 0): 8.8, (EXACT, 3): 6.0, (SLOPES, 0): 4.0}
    assert budgets(lambda kind, depth: steps[kind, depth], 3) == [12.0, 7.0, 5.0]
    with pytest.raises(SpryError, match=r"forward mode on all units \(6.500 MiB\).*--budgets"):
        budgets(lambda kind, depth: {**steps, (SLOPES, 0): 6.5}[kind, depth], 3)


def test_steps_are_those_that_the_server_deals_by(plan: Plan) -> None:
    """Four units, of which the upper two are in the upper block."""
    mib, half = smallest(plan, benchmark.MIXED)
    assert half == 1 and 0 < mib(SLOPES, 0) < mib(EXACT, half) < mib(EXACT, 0)


def done(round_: int, partition: int, box_s: float, **more: Any) -> dict[str, Any]:
    usual = {"gradient": "", "units": 2, "forwards": 10.0, "s": 0.5, "examples": 8, "steps": 1, "bytes": 100}
    return {"round": round_, "partition": partition, "box-s": box_s, "peak-mib": 0.0, **usual, **more}


WORK = [
    {"round": 0, "partition": 0, "rows": 20},
    {"round": 0, "partition": 1, "rows": 30},
    {"round": 0, "partition": 2, "refused": "too small"},
    done(1, 0, 1.0, **{"peak-mib": 2.5, "s": 9.0}),
    {"round": 1, "partition": 1, "refused": "out of memory"},
    done(2, 0, 2.0),
    done(2, 1, 5.0, units=1, bytes=40),
]


def test_a_round_lasts_as_long_as_its_slowest_client_computes() -> None:
    assert [simulated(WORK, until=last) for last in (0, 1, 2, 9)] == [0, 1.0, 6.0, 6.0]


def test_what_boxes_did_is_told_by_their_size_by_hand() -> None:
    fleet = Fleet((Box(24, 1, 1.0, 3.0), Box(4, 2, 4.0, 1.0)), 1.0, {})
    found = shares(fleet, [Outcome(work=WORK), Outcome(work=[*WORK, done(3, 0, 2.0)])])
    large, little = found.sizes
    assert found.rows == 50 and found.bytes_up == pytest.approx((6 * 100 + 0 + 2 * 40 - 100) / 7)
    assert found.ms == 50.0  # the round that measured memory is no measure of time
    assert (large.trained, large.left_out, large.refused, large.peak_mib) == (1, 0, 0, 2.5)
    assert (little.trained, little.left_out, little.refused, little.peak_mib) == (1, 1, 1, None)
    assert (large.round_s, little.round_s) == (pytest.approx((1.5 + 5 / 3) / 2), 5.0)
    assert (large.dealt, little.dealt) == ("2 x ", "1 x ")
    head, lines = table({"row": found}, rows=80)
    assert len(lines) == 2 and {len(line) for line in lines} == {len(head)} and lines[0][1] == "50 of 80"


def test_boxes_that_hold_no_exact_step_are_left_out_by_themselves(plan: Plan) -> None:
    """A thousandth of a MiB holds no step of the tiny model. The curve is timed by what the others say of their speed:
    twice as slow are those in the middle.
    """
    boxes = (Box(24, 2, 1.0, 64.0), Box(8, 4, 2.0, 64.0), Box(4, 4, 4.0, 0.001))
    fleet = Fleet(boxes, 10.0, {})
    own = dataclasses.replace(plan, own=fleet.own())
    identify()
    outcome = measure(own.cell(own.final(benchmark.ROWS["backprop, boxes that hold it"].keys, 0)))
    assert not outcome.error
    found = shares(fleet, [outcome])
    assert [(one.trained, one.left_out) for one in found.sizes] == [(2, 0), (4, 0), (0, 4)]
    assert found.rows == 36  # of 60, dealt evenly to ten
    assert all(one.peak_mib and one.peak_mib <= 64 for one in found.sizes[:2])
    slowest = max(item["forwards"] for item in outcome.work if "forwards" in item and item["partition"] >= 2)
    assert outcome.last["simulated-s"] == pytest.approx(slowest * 0.02)
    assert axes([outcome.curve]) == ["rounds", "forwards", "MiB", "simulated s"]
    assert axes([outcome.curve, measure(plan.cell(plan.final(benchmark.HEAD_ALONE, 0))).curve]) == axes([])[:3]


def test_a_row_is_timed_by_its_own_passes_too() -> None:
    """Both come to 0.8 after 10 s at 2 ms a pass. The other row's passes took twice as long, ours as long: after ours
    has ended the other is half-way.
    """

    def line(round_: int, accuracy: float) -> dict[str, Any]:
        return {"round": round_, "simulated-s": 10.0 * round_, "accuracy": accuracy}

    curves = {name: [[line(0, 0.5), line(1, 0.8)]] for name in ("mixed", "other")}
    found = {name: Shares(0.0, 0.0, ms, ()) for name, ms in (("mixed", 2.0), ("other", 4.0))}
    (told,) = benchmark._against(curves, found, 2.0).values()
    assert [round(figure.mean or 0.0, 6) for figure in told.values()] == [0.0, 0.0, 0.0, 15.0]


def test_test_rows_are_drawn_from_the_evaluation_file(plan: Plan, tmp_path: Path) -> None:
    some = with_fewer_tests(plan.split, tmp_path, "sst2", 10)
    told, whole = (path.read_text().splitlines() for path in (some.test, plan.split.test))
    assert len(told) == 10 and all(told.count(row) <= whole.count(row) for row in told)
    assert (some.train, some.choice) == (plan.split.train, plan.split.choice)


def test_a_shape_is_planned_on_every_box_at_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the second box is less than the weights; on the first one a pass takes twice 10 ms."""
    monkeypatch.setitem(LARGE, "tiny", {"data.max-length": 16, "client.micro-batch": 0})
    large, little = planned("tiny", [Box(1.0, 1, 2.0), Box(0.5001, 1, 4.0)], forward_ms=10.0, reserve_gib=0.5)
    assert large.memory_mib == 512 and all(row.fits for row in large.rows)
    assert large.taken is not None and large.rows[large.taken].gradient == "backprop"
    assert large.rows[large.taken].step_s == pytest.approx(large.rows[large.taken].forwards * 0.02)
    assert little.taken is None and not any(row.fits for row in little.rows)
    told = list(lines(large))
    assert told[0][0] == "1 GB (512 MiB free)" and "**backprop**" in {line[1] for line in told}
    assert {len(line) for line in [*told, *lines(little)]} == {len(HEAD)}


@pytest.mark.slow
def test_a_comparison_of_boxes_leaves_its_tables(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--data sst2 --rounds 1 --evaluations 1 --seeds 1 --jobs 0 --train-rows 60 --choice-rows 8 --test-rows 8"
    rows = "head alone, every box;mixed"
    arguments = ["--data-dir", str(folder), "--out", str(tmp_path), "--rows", rows, "--budgets", "64,64,0.001"]
    benchmark.main([*sizes.split(), *arguments, "--set", f"model.name={folder / 'tiny'}"])
    out = capsys.readouterr().out
    assert "equal simulated s" in out and "By size of box" in out
    record = json.loads((tmp_path / "fleet-sst2-0.5.json").read_text())
    assert record["mixed less others"].keys() == {"head alone, every box"}
    assert record["shares"]["mixed"]["rows"] == 36 and record["settings"]["own"][9]["memory-budget-mib"] == 0.001
    assert (tmp_path / "fleet-sst2-0.5.png").stat().st_size > 1000


def test_an_unknown_row_is_refused(folder: Path, tmp_path: Path) -> None:
    arguments = ["--data", "sst2", "--data-dir", str(folder), "--out", str(tmp_path), "--budgets", "64,64,1"]
    with pytest.raises(SystemExit, match=r"--rows has 'nothing'; it may have head alone, every box; SPRY"):
        benchmark.main([*arguments, "--set", f"model.name={folder / 'tiny'}", "--rows", "nothing"])
