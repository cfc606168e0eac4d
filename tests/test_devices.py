"""What nodes say of their machines: measured within bounds, checked on arrival, kept with the run, shown in it."""

import dataclasses
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from federation import Federation, make_rows, tiny_run
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto

from spry_app.autodiff.gradients import GRADIENTS
from spry_app.client import device
from spry_app.client.device import device_of
from spry_app.client.node import Node, load_node
from spry_app.client.power import cpu_limit_w, gpu_limit_w
from spry_app.client.trust import trusted
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.protocol import Device, Introduction, MalformedReply, introduction_request
from spry_app.report import render
from spry_app.report.clients import Crew, node_table
from spry_app.report.folder import read_run
from spry_app.server.devices import sentence

SAID = Device("NVIDIA Orin", 12.5, 4000.0, 80.0, False, 15.0)
NODE = {"partition-id": 0, "num-partitions": 1}


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_run(tmp_path_factory.mktemp("tiny")) | {"client.local-steps": 1, "client.directions": 1}


@pytest.fixture
def node(run_config: dict[str, Any]) -> Node:
    """As if nothing had been timed in this process yet."""
    device._timed.clear()
    return load_node(RunConfig.from_flower(run_config), NODE)


class Passes:
    """In place of the objective: passes that take so many seconds each, on a clock of their own."""

    def __init__(self, patch: pytest.MonkeyPatch, *seconds: float) -> None:
        self.now, self.rows, self._left = 0.0, list[int](), list(seconds)
        patch.setattr(device, "objective", self._made)
        patch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def _made(self, adapted: object, rows: object, indices: list[int], seed: object) -> Any:
        self.rows = indices
        return self._pass

    def _pass(self, tensors: object) -> float:
        self.now += self._left.pop(0)
        return 0.0


def test_the_time_of_a_pass_is_the_least_of_a_few_by_row(node: Node, run_config: dict, monkeypatch: Any) -> None:
    """Of 4 rows at once, the first pass 900 ms, the least 80: 20 ms a row. The second time nothing is measured."""
    passes = Passes(monkeypatch, 0.9, 0.1, 0.08, 0.2, 0.1)
    config = RunConfig.from_flower(run_config)
    assert device_of(node, config).forward_ms == pytest.approx(20)
    lengths = sorted(map(node.train.length, range(len(node.train))))
    assert {node.train.length(row) for row in passes.rows} == {lengths[len(lengths) // 2]} and len(passes.rows) == 4
    assert device_of(node, config).forward_ms == pytest.approx(20)


def test_slow_passes_are_few(node: Node, run_config: dict, monkeypatch: Any) -> None:
    """None is begun after two seconds."""
    Passes(monkeypatch, 1.5, 1.2)
    assert device_of(node, RunConfig.from_flower(run_config)).forward_ms == pytest.approx(1200 / 4)


@pytest.mark.parametrize(("budget", "rows"), [(10.0, 1), (64.0, 2), (1000.0, 4)])
def test_a_budget_holds_in_the_passes_that_are_timed_too(
    budget: float, rows: int, node: Node, run_config: dict, monkeypatch: Any
) -> None:
    """Where a row takes 30 MiB."""
    passes = Passes(monkeypatch, *[0.8] * 9)
    monkeypatch.setattr(device, "peak_mib", lambda one_pass, where: 30.0)
    boxed = dataclasses.replace(node, memory_mib=budget)
    assert device_of(boxed, RunConfig.from_flower(run_config)).forward_ms == pytest.approx(800 / rows)
    assert len(passes.rows) == rows


def test_a_pass_is_timed_as_the_clock_has_it(node: Node, run_config: dict) -> None:
    """A hundred times as long rows would be, were it another unit."""
    found = device_of(node, RunConfig.from_flower(run_config))
    assert found.forward_ms is not None and 0.001 < found.forward_ms < 1000
    assert found.free_mib is not None and 1 < found.free_mib < psutil.virtual_memory().total / 2**20
    assert found.accelerator.startswith("cpu ")


@pytest.mark.parametrize(
    ("packages", "limit"),
    [
        ({}, None),
        ({"intel-rapl:0": "28000000\n"}, 28.0),
        ({"intel-rapl:0": "95000000\n", "intel-rapl:1": "95000000\n", "intel-rapl:0:0": "0\n"}, 190.0),
        ({"intel-rapl:0": "28000000\n", "intel-rapl:2": "60000000\n"}, 28.0),
        ({"intel-rapl:0": "0\n"}, None),
        ({"intel-rapl:0": "28000000\n", "intel-rapl:1": ""}, None),
    ],
)
def test_the_limit_of_a_processor_is_that_of_its_packages(packages: dict, limit: float | None, tmp_path: Path) -> None:
    """As Linux lays them out; what lies within a package is a part of it, and a package of the platform (2)."""
    for name, text in packages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text("psys\n" if name.endswith(":2") else f"package-{name[-1]}\n")
        (tmp_path / name / "constraint_0_power_limit_uw").write_text(text)
    assert cpu_limit_w(tmp_path) == limit


@pytest.mark.parametrize(("says", "limit"), [("700.00", 700.0), ("[N/A]", None), ("", None), (None, None)])
def test_the_limit_of_a_gpu_is_what_its_tool_says(
    says: str | None, limit: float | None, tmp_path: Path, monkeypatch: Any
) -> None:
    """A tool in its place, as there is no GPU here; on a Jetson it says [N/A], and elsewhere there is none."""
    if says is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f'#!/bin/sh\n[ "$1" = --id=GPU-7 ] && [ "$2" = --query-gpu=power.limit ] && echo "{says}"\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_limit_w("GPU-7") == limit


@pytest.mark.parametrize(
    ("battery", "said"),
    [
        (None, (None, None)),
        (SimpleNamespace(percent=41.5, power_plugged=False), (41.5, False)),
        (SimpleNamespace(percent=100.0, power_plugged=None), (100.0, None)),
        (SimpleNamespace(percent=math.nan, power_plugged=True), (None, None)),
    ],
)
def test_a_battery_is_stated_where_there_is_one(
    battery: Any, said: tuple, node: Node, run_config: dict, monkeypatch: Any
) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    found = device_of(node, RunConfig.from_flower(run_config))
    assert (found.battery_percent, found.plugged) == said


def test_a_node_may_say_itself_how_fast_it_is_and_says_nothing_in_a_private_run(node: Node, run_config: dict) -> None:
    config = RunConfig.from_flower(run_config)
    assert device_of(load_node(config, NODE | {"forward-ms": 7}), config).forward_ms == 7.0
    private = RunConfig.from_flower(run_config | {"privacy.mode": "local"})
    assert device_of(load_node(private, NODE | {"forward-ms": 7}), private) == Device()
    for wrong in (0, -1.0, math.inf, True, "fast"):
        with pytest.raises(SpryError, match=r"forward-ms=.*must be a positive number of milliseconds"):
            load_node(config, NODE | {"forward-ms": wrong})


def test_a_kind_that_fails_its_test_is_not_stated_and_logged(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    without = dataclasses.replace(node, adapted=dataclasses.replace(node.adapted, blocks=()))
    with caplog.at_level(logging.WARNING):
        found = trusted(without, GRADIENTS["backprop"], 1)
    assert "checkpointed-backprop" not in found and "backprop" in found
    assert "does not offer gradient='checkpointed-backprop': The blocks of this bert model" in caplog.text


def arrived(said: Introduction, **changed: Any) -> Introduction:
    message = said.to_message(introduction_request(1, "x"))
    content = dict(message.content["introduction"]) | changed
    message.content = RecordDict({"introduction": ConfigRecord(content)})
    return Introduction.from_message(message_from_proto(message_to_proto(message)))


def test_what_a_node_says_arrives_and_what_it_leaves_out_is_not_stated() -> None:
    for said in (SAID, Device(), Device(plugged=True, battery_percent=0.0), Device(forward_ms=1e-3)):
        introduction = Introduction(0, "x", 1, 0, "d", device=said)
        assert arrived(introduction) == introduction


@pytest.mark.parametrize(
    "changed",
    [
        *[{"forward-ms": value} for value in (0.0, -1.0, math.nan, math.inf, 1e300, "1", [1.0], True)],
        *[{"free-mib": value} for value in (-1.0, math.nan, math.inf)],
        *[{"power-limit-w": value} for value in (0.0, -1.0, math.nan, math.inf)],
        *[{"battery-percent": value} for value in (-0.1, 100.1, math.nan)],
        {"plugged": 1},
        {"accelerator": "x" * 121},
        {"accelerator": 5},
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(MalformedReply):
        arrived(Introduction(0, "x", 1, 0, "d", device=SAID), **changed)


def test_an_accelerator_cannot_write_to_a_terminal() -> None:
    assert arrived(Introduction(0, "x", 1, 0, "d"), accelerator="a\x1b[2J\nb").device.accelerator == "a [2J b"


def test_one_sentence_says_what_a_fleet_is() -> None:
    fleet = [
        Introduction(0, "x", 1, 0, "d", 60.0, ("forward-mode",), SAID),
        Introduction(1, "x", 1, 0, "d", 400.0, ("forward-mode", "backprop"), Device("H200", 0.5)),
        Introduction(2, "x", 1, 0, "d", 0.0, ("backprop",), Device("H200", 1.5, plugged=True)),
    ]
    assert sentence(fleet) == (
        "3 nodes can be used. a forward pass of an example in 0.5 to 12.5 ms, median 1.5; 60 to 400 MiB a step on the "
        "2 that have a budget; gradients: forward-mode on 2, backprop on 2; 2 x H200; 1 x NVIDIA Orin; 1 on battery"
    )


def test_a_run_keeps_and_shows_what_its_nodes_said(
    run_config: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"data.test": str(make_rows(tmp_path / "test.jsonl", 16, offset=500))}
    federation = Federation(tmp_path, run_config | keys)
    with caplog.at_level(logging.INFO, logger="flwr"):
        federation.start(2, rounds=1, own=({"forward-ms": 2.5}, {"forward-ms": 40.0, "memory-budget-mib": 300.0}))
    assert "2 nodes can be used. a forward pass of an example in 2.5 to 40 ms" in caplog.text
    first, second = json.loads((tmp_path / "run.json").read_text())["nodes"]
    assert (first["forward-ms"], second["forward-ms"], second["memory-mib"]) == (2.5, 40.0, 300.0)
    assert set(first["gradients"]) == GRADIENTS.keys() - {"bisected-backprop"} and first["free-mib"] > 0
    head, rows = node_table(Crew(read_run(tmp_path)))
    table = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["forward pass of an example"] for row in table] == ["2.5 ms", "40 ms"]
    assert [row["memory for a step"] for row in table] == ["not stated", "300 MiB"]
    assert "forward-mode" in table[0]["gradients"] and table[0]["computes on"] in render([tmp_path])


def test_a_report_is_made_of_whatever_nodes_are_written_down() -> None:
    """Of runs before nodes said so much, and of files that somebody changed."""
    about = {"nodes": [{"node": "7", "partition": 0}, {"node": 8, "partition": 1, "gradients": 3, "plugged": "no"}]}
    about["nodes"] += [
        {
            "node": "9",
            "partition": 2,
            "plugged": False,
            "battery-percent": 41.4,
            "forward-ms": "x",
            "power-limit-w": 28.0,
        }
    ]
    _, rows = node_table(Crew(SimpleNamespace(about=about, config={}, assignments=[])))  # type: ignore[arg-type]
    assert [row[-2] for row in rows] == ["not stated", "not stated", "battery, 41 %, at most 28 W"]
    assert [row[-1] for row in rows] == ["not stated"] * 3
