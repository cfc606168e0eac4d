"""Shares by what a node's memory holds: by hand, and in a federation of boxes that state different memory."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from federation import Federation, LocalGrid, make_rows, tiny_run
from flwr.app import ConfigRecord, Message
from hypothesis import given
from hypothesis import strategies as st

from spry_app.autodiff.gradients import GRADIENTS
from spry_app.config import RunConfig
from spry_app.errors import OutOfMemory, SpryError
from spry_app.methods import METHODS, get_method
from spry_app.methods.assignment import Deal
from spry_app.methods.by_device import by_device
from spry_app.protocol import introduction_request, lacks_memory, refusal, refusal_reason
from spry_app.server.checkpoint import load
from spry_app.server.held_out import held_out
from spry_app.server.memory import step_memory
from spry_app.server.run import federate

UNITS = "abcdef"
EVERY = tuple(GRADIENTS)


def step_mib(gradient: str, lowest: int) -> float:
    """Forward mode takes 10 wherever it begins; an exact gradient 6 a block, or 12 without checkpoints; bisected it is
    beyond all of them.
    """
    above = len(UNITS) - lowest
    exact = {"checkpointed-backprop": 6.0 * above, "backprop": 12.0 * above, "bisected-backprop": 1e3}
    return exact.get(gradient, 10.0)


def deal(*memory_mib: float, round_: int = 1, **changed: Any) -> Deal:
    """Six units of one value, a block each."""
    return dataclasses.replace(
        Deal(
            units=tuple(UNITS),
            depths=tuple(range(6)),
            sizes=(1,) * 6,
            blocks=6,
            memory_mib=memory_mib,
            round=round_,
            gradients=(EVERY,) * len(memory_mib),
            step_mib=step_mib,
        ),
        **changed,
    )


def found(dealt: Deal) -> list[tuple[str, str, int]]:
    return [("".join(share), share.gradient, share.directions) for share in by_device(dealt)]


CHECKPOINTED = "checkpointed-backprop"


def test_strong_nodes_take_exact_gradients_and_weak_ones_slopes_on_upper_units() -> None:
    """36 MiB hold all six blocks, 24 four of them; 11 hold one exact block or slopes anywhere, so of the bands de and f
    the upper one is exact.
    """
    assert found(deal(0.0, 36.0, 24.0, 11.0, 11.0)) == [
        (UNITS, CHECKPOINTED, 1),
        (UNITS, CHECKPOINTED, 1),
        ("cdef", CHECKPOINTED, 1),
        ("f", CHECKPOINTED, 1),
        ("de", "", 0),
    ]


def test_of_exact_kinds_a_node_takes_the_one_that_reaches_furthest_and_then_the_fastest() -> None:
    """Bisected, 15 on all six blocks: for 16 MiB, where checkpoints would reach two, and not for 40, which hold all six
    with checkpoints; 72 hold them all. Who has said nothing keeps to checkpoints. 11 have their bands as ever.
    """

    def mib(kind: str, lowest: int) -> float:
        return 15.0 if kind == "bisected-backprop" else step_mib(kind, lowest)

    assert found(deal(72.0, 40.0, 16.0, 0.0, 11.0, step_mib=mib)) == [
        (UNITS, "backprop", 1),
        (UNITS, CHECKPOINTED, 1),
        (UNITS, "bisected-backprop", 1),
        (UNITS, CHECKPOINTED, 1),
        ("def", "", 0),
    ]
    without = (EVERY, tuple(kind for kind in EVERY if kind != "bisected-backprop"))
    assert found(deal(16.0, 16.0, step_mib=mib, gradients=without)) == [
        (UNITS, "bisected-backprop", 1),
        ("def", "", 0),
    ]


def test_without_strong_nodes_bands_cover_everything_and_the_top_one_is_exact() -> None:
    """Two bands of three for forward mode; three of two, of which 12 MiB hold the uppermost exactly."""
    assert found(deal(11.0, 10.5)) == [("abc", "", 0), ("def", "", 0)]
    assert found(deal(13.0, 14.0, 12.0)) == [("cd", "", 0), ("ab", "", 0), ("ef", CHECKPOINTED, 1)]


def test_a_unit_out_of_reach_goes_to_the_most_memory() -> None:
    """Five MiB hold nothing."""
    assert found(deal(5.0, 4.0)) == [(UNITS, "", 0), ("f", "", 0)]


def test_a_node_whose_memory_holds_no_tangents_takes_two_plain_forwards() -> None:
    """Central differences for 5 MiB, where forward mode takes 10; 7 hold an exact step on the uppermost block alone. In
    the end forward mode reaches no lower than c: who covers the units below takes what reaches them.
    """

    def mib(kind: str, lowest: int) -> float:
        return 5.0 if kind == "central-difference" else step_mib(kind, lowest)

    central = "central-difference"
    assert found(deal(36.0, 7.0, step_mib=mib)) == [(UNITS, CHECKPOINTED, 1), ("def", central, 0)]
    assert found(deal(7.0, 6.0, step_mib=mib)) == [("abc", central, 0), ("def", central, 0)]
    only = {"gradients": (EVERY, ("forward-mode", CHECKPOINTED))}
    assert found(deal(36.0, 7.0, step_mib=mib, **only))[1] == ("f", CHECKPOINTED, 1)
    deep = {"step_mib": lambda kind, lowest: mib(kind, lowest) if lowest > 1 or kind == central else 99.0}
    assert found(deal(11.0, 11.0, **deep)) == [("abef", central, 0), ("cd", "", 0)]


def test_a_node_is_given_only_what_it_can_take() -> None:
    assert found(deal(0.0, gradients=(("backprop", "forward-mode"),))) == [(UNITS, "backprop", 1)]
    assert found(deal(0.0, gradients=(("forward-mode",),))) == [(UNITS, "", 0)]
    exact = {"gradient": CHECKPOINTED, "gradients": (EVERY, ("backprop", "central-difference"))}
    assert found(deal(0.0, 11.0, **exact)) == [(UNITS, "", 1), ("def", "central-difference", 0)]


@given(
    memory=st.lists(st.sampled_from([0.0, 1.0, 9.0, 11.0, 13.0, 20.0, 30.0, 40.0]), min_size=1, max_size=9),
    round_=st.integers(1, 50),
    units=st.integers(1, 6),
)
def test_every_unit_is_covered_and_what_fits_somewhere_is_within_memory(
    memory: list[float], round_: int, units: int
) -> None:
    own = {"units": tuple(UNITS[-units:]), "depths": tuple(range(6 - units, 6)), "sizes": (1,) * units}
    shares = by_device(deal(*memory, round_=round_, **own))
    assert {unit for share in shares for unit in share} == set(UNITS[-units:])
    assert all(share == sorted(set(share)) and share for share in shares)
    for mib, share in zip(memory, shares, strict=True):
        takes = step_mib(share.gradient or "forward-mode", UNITS.index(share[0]))
        assert not mib or takes <= mib or (share.gradient == "" and mib < 10)


def test_replies_of_slopes_cannot_be_of_unequal_kinds() -> None:
    for method, row in METHODS.items():
        config = RunConfig.from_flower({"method": method, "assign": "by-device"})
        if row.reply == "slopes":
            with pytest.raises(SpryError, match=r"assign='by-device': clients of method=.* reply with slopes"):
                get_method(config)
        else:
            assert get_method(config).assign is by_device


def test_a_refusal_says_whether_memory_was_short() -> None:
    request = introduction_request(1, "x")
    assert not lacks_memory(refusal(request, SpryError("no"))) and not lacks_memory(request)
    short = refusal(request, OutOfMemory("none left"))
    assert lacks_memory(short) and refusal_reason(short) == "none left"


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    keys = {"method": "spry", "assign": "by-device", "server.weighting": "precision", "num-server-rounds": 3}
    return tiny_run(folder) | keys | {"data.test": str(make_rows(folder / "test.jsonl", 16, offset=500))}


def test_a_fleet_of_unequal_boxes_trains_and_one_that_ran_out_is_given_less(run_config: dict, tmp_path: Path) -> None:
    """An exact step is taken for 300 MiB, 200 on the upper block alone, and slopes for 50 anywhere. Of nodes that say
    nothing, 400 and 60, the second is out of memory in round 1: then it has 150, half of what it was asked.
    """
    federation = Federation(tmp_path, run_config)
    takes = {CHECKPOINTED: [300.0, 200.0, 100.0], "backprop": [900.0] * 3, "bisected-backprop": [900.0] * 3}
    federation.strategy.step_mib = lambda gradient, lowest: takes.get(gradient, [50.0] * 3)[lowest]
    asked: list[tuple[int, int, int, str]] = []

    def watch(partition: int, reply: Message) -> Message:
        task = federation.strategy.tasks[reply.metadata.src_node_id]
        asked.append((task.round, partition, len(task.units) - 1, task.gradient))
        if (task.round, partition) == (1, 1):
            for name in list(reply.content):
                del reply.content[name]
            reply.content["refusal"] = ConfigRecord({"reason": "no memory", "out-of-memory": True})
        return reply

    boxes = ({}, {"memory-budget-mib": 400.0}, {"memory-budget-mib": 60.0})
    federation.start(3, tamper=watch, own=boxes)
    assert sorted(asked) == [
        (1, 0, 4, CHECKPOINTED),
        (1, 1, 4, CHECKPOINTED),
        (1, 2, 2, ""),
        *[(round_, *share) for round_ in (2, 3) for share in [(0, 4, CHECKPOINTED), (1, 1, ""), (2, 1, "")]],
    ]
    lines = federation.recorder.rounds[1:]
    assert [(line.answered, line.refused) for line in lines] == [(2, 1), (3, 0), (3, 0)]


def test_a_node_that_ran_out_of_memory_has_less_after_a_resume_too(run_config: dict, tmp_path: Path) -> None:
    """In a server that never saw it fail, whatever the node says then."""
    boxes = ({}, {"memory-budget-mib": 400.0}, {"memory-budget-mib": 60.0})
    grid = LocalGrid(3, run_config, own=boxes)
    nodes = list(grid.contexts)
    first, second = (Federation(tmp_path / name, run_config) for name in ("first", "second"))
    first.strategy.fleet.limit(nodes[1], 150.0)
    first.strategy.checkpoint().save(tmp_path / "first")
    second.strategy.resume(load(tmp_path / "first", second.config))
    assert second.strategy.fleet.available(grid) == nodes  # type: ignore[arg-type]
    assert second.strategy.fleet.memory_mib(nodes) == [0.0, 150.0, 60.0]


def test_a_budget_that_holds_no_step_of_the_share_is_told_to_the_server(run_config: dict, tmp_path: Path) -> None:
    """Not when the node introduces itself, when its share is not known yet."""
    federation = Federation(tmp_path, run_config)
    federation.strategy.step_mib = lambda gradient, lowest: 1.0
    federation.start(2, rounds=1, own=({}, {"memory-budget-mib": 0.001}))
    assert federation.recorder.current.refused == 1
    assert "its budget is 0.0 MiB" in federation.recorder.current.reasons[0]
    assert list(federation.strategy.fleet.limits.values()) == [0.5]


def test_an_exact_step_takes_more_the_lower_it_begins(run_config: dict, tmp_path: Path) -> None:
    """As the server measures it for a run, on rows of its test set."""
    config, made = RunConfig.from_flower(run_config), Federation(tmp_path, run_config)
    rows = held_out(config, made.adapted)
    assert rows is not None
    mib = step_memory(made.adapted, rows, config, made.strategy.method)
    assert mib(CHECKPOINTED, 0) > mib(CHECKPOINTED, 1) > mib(CHECKPOINTED, 2) > 0
    assert mib("forward-mode", 0) > 0


@pytest.mark.parametrize("tested_by", ["server", "clients"])
def test_a_run_measures_its_own_steps(tested_by: str, run_config: dict, tmp_path: Path) -> None:
    """64 MiB hold any step of the tiny model, a thousandth of one none: that node is left with the top, and says no. It
    scores nevertheless, which takes no step.
    """
    keys = {"num-server-rounds": 1} | ({"data.test": ""} if tested_by == "clients" else {})
    own = ({"memory-budget-mib": 64.0}, {"memory-budget-mib": 64.0}, {"memory-budget-mib": 0.001})
    grid = LocalGrid(3, run_config | keys, own=own)
    done = federate(grid, RunConfig.from_flower(run_config | keys), tmp_path)  # type: ignore[arg-type]
    (line,) = (json.loads(line) for line in (tmp_path / "assignments.jsonl").read_text().splitlines())
    held = {node: len(hand["units"]) for hand in line["hands"] for node in hand["nodes"]}
    assert [held[str(node)] for node in sorted(grid.contexts)] == [5, 5, 2]
    last = done.recorder.rounds[-1]
    assert (last.answered, last.refused) == (2, 1)
    heldout = sum(node["heldout"] for node in json.loads((tmp_path / "run.json").read_text())["nodes"])
    score = done.recorder.score
    assert tested_by == "server" or (score and score.examples == heldout > 0)
