"""Slow clients get so much less work that a round's clients end about together: by hand, and over whole fleets."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, tiny_run
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st
from test_refused_replies import ASKED, SOUND

from spry_app.autodiff.gradients import GRADIENTS
from spry_app.methods.assignment import Deal, Share, cyclic_split
from spry_app.methods.by_device import by_device
from spry_app.methods.pace import SLACK, in_time
from spry_app.protocol import from_arrays
from spry_app.report import render
from spry_app.report.clients import Crew, units_grid, work_table
from spry_app.report.folder import read_run
from spry_app.server.checks import problem

UNITS = tuple("abcdef")


def deal(*forward_ms: float, steps: int = 8, **changed: Any) -> Deal:
    """Six units, a block each; eight directions, four at once."""
    clients = len(forward_ms)
    plain = Deal(
        units=UNITS,
        depths=tuple(range(6)),
        sizes=(1,) * 6,
        blocks=6,
        memory_mib=(0.0,) * clients,
        round=1,
        forward_ms=forward_ms,
        steps=(steps,) * clients,
        directions=8,
        directions_at_once=4,
    )
    return dataclasses.replace(plain, **changed)


def work(shares: list[Share]) -> list[tuple[int, int]]:
    return [(share.steps, share.directions) for share in shares]


def passes(share: Share, directions: int) -> float:
    """Of an example in a step, counted anew: each of the passes that directions share, and a tangent a direction above
    the lowest unit; or a pass, the way back, and what is computed again: nothing, once, or (of 64 blocks) three times.
    """
    above = 1 - UNITS.index(min(share)) / 6
    back = {"backprop": 1, "checkpointed-backprop": 2, "bisected-backprop": 4}
    return (
        1 + back[share.gradient] * above
        if share.gradient
        else math.ceil(directions / min(directions, 4)) + directions * above
    )


def times(dealt: Deal, shares: list[Share]) -> list[float]:
    """Milliseconds that each client takes, for a batch of one."""
    return [
        ms * (share.steps or steps) * passes(share, share.directions or dealt.directions)
        for ms, steps, share in zip(dealt.forward_ms, dealt.steps, shares, strict=True)
    ]


def test_a_client_four_times_as_slow_takes_a_quarter_of_the_steps() -> None:
    """All on every unit along 8 directions, four at once: 10 passes a step, 80 ms for the two fast ones."""
    every = [Share(UNITS)] * 3
    assert work(in_time(deal(1.0, 1.0, 4.0), every)) == [(0, 0), (0, 0), (2, 0)]
    assert work(in_time(deal(1.0, 1.0, 1.4), every)) == [(0, 0)] * 3
    assert work(in_time(deal(1.0, 1.0, 1.6), every)) == [(0, 0), (0, 0), (5, 0)]  # 16 ms a step


def test_a_client_whose_single_step_is_too_long_takes_fewer_directions() -> None:
    """80 ms: at 16 ms a pass 5 passes, four directions and the one they share; at 100 not even one direction's 2."""
    every = [Share(UNITS)] * 3
    assert work(in_time(deal(1.0, 1.0, 16.0), every)) == [(0, 0), (0, 0), (1, 4)]
    assert work(in_time(deal(1.0, 1.0, 20.0), every)) == [(0, 0), (0, 0), (1, 3)]
    assert work(in_time(deal(1.0, 1.0, 100.0), every)) == [(0, 0), (0, 0), (1, 1)]


def test_an_exact_gradient_has_only_steps_to_give() -> None:
    exact = Share(UNITS, "checkpointed-backprop", 1)
    assert work(in_time(deal(1.0, 1.0, 1000.0), [exact] * 3)) == [(0, 1), (0, 1), (1, 1)]


def test_what_a_share_costs_counts_as_much_as_the_machine() -> None:
    """On equal machines slopes on all blocks take 10 passes, an exact gradient there 3: 8 steps of which are 24 ms."""
    shares = [Share(UNITS, "checkpointed-backprop", 1)] * 2 + [Share(UNITS), Share(("f",))]
    assert work(in_time(deal(1.0, 1.0, 1.0, 1.0), shares)) == [(0, 1), (0, 1), (2, 0), (0, 0)]


def test_one_that_says_it_is_very_fast_or_nothing_moves_nobody() -> None:
    every = [Share(UNITS)] * 4
    assert work(in_time(deal(1e-9, 1.0, 1.0, 1.0), every)) == [(0, 0)] * 4
    assert work(in_time(deal(0.0, 0.0, 0.0, 9.0), every)) == [(0, 0)] * 4
    assert work(in_time(deal(0.0, 1.0, 0.0, 4.0), every)) == [(0, 0), (0, 0), (0, 0), (2, 0)]
    assert work(in_time(deal(1.0, 9.0, forward_ms=()), every[:2])) == [(0, 0)] * 2


def test_more_rows_take_longer_on_equal_machines() -> None:
    """Whole passes over the rows: 40 steps against 8."""
    every = [Share(UNITS)] * 3
    assert work(in_time(dataclasses.replace(deal(1.0, 1.0, 1.0), steps=(8, 8, 40)), every)) == [(0, 0), (0, 0), (8, 0)]


@given(
    machines=st.lists(
        st.tuples(st.sampled_from([0.0, 11.0, 13.0, 30.0]), st.floats(0.01, 1000)), min_size=1, max_size=9
    ),
    steps=st.integers(1, 40),
    round_=st.integers(1, 20),
)
def test_nobody_ends_long_after_the_median_unless_it_does_the_least_there_is(
    machines: list[tuple[float, float]], steps: int, round_: int
) -> None:
    """Whoever has which units, it is as without times; and nothing is more than is set."""

    def step_mib(gradient: str, lowest: int) -> float:
        exact = {
            "backprop": 12.0 * (6 - lowest),
            "checkpointed-backprop": 6.0 * (6 - lowest),
            "bisected-backprop": 12.0,
        }
        return exact.get(gradient, 10.0)

    memory, speeds = zip(*machines, strict=True)
    kinds = {"gradients": (tuple(GRADIENTS),) * len(machines), "step_mib": step_mib, "round": round_}
    dealt = deal(*speeds, steps=steps, memory_mib=memory, **kinds)
    shares, before = by_device(dealt), by_device(dataclasses.replace(dealt, forward_ms=()))
    assert [(list(share), share.gradient) for share in shares] == [(list(share), share.gradient) for share in before]
    whole, found = times(dealt, before), times(dealt, shares)
    median = sorted(whole)[(len(whole) - 1) // 2]
    for share, old, took, own in zip(shares, whole, found, before, strict=True):
        assert took <= max(SLACK * median, 0) * (1 + 1e-9) or (share.steps == 1 and share.directions == 1)
        assert took <= old and 0 <= share.steps <= steps and share.directions <= 8
        assert old > SLACK * median * (1 - 1e-9) or (share.steps, share.directions) == (own.steps, own.directions)


@pytest.mark.parametrize("at_once", [1, 4, 8])
def test_at_one_cost_fewer_steps_leave_less_noise_than_fewer_directions(at_once: int) -> None:
    """Why steps go first: 2 of 8 steps along 8 directions, or 8 of as many as cost no more than that.

    The variance of a step's mean is c + (d + 1) / K (B + c), in units of |g|^2 / B (methods.precision), over the steps.
    """
    d, batch, single = 256, 8, 100.0

    def variance(steps: int, directions: int) -> float:
        return (single + (d + 1) / directions * (batch + single)) / steps

    def cost(steps: int, directions: int) -> int:
        return steps * (math.ceil(directions / min(directions, at_once)) + directions)

    fewer_steps = (2, 8)
    fewer_directions = (8, max(k for k in range(1, 9) if cost(8, k) <= cost(*fewer_steps)))
    lost = variance(*fewer_steps) / variance(*fewer_directions)
    assert lost < 1.04 if at_once == 1 else lost < 0.6


def test_what_is_shared_by_all_comes_with_the_same_work() -> None:
    assert work([Share.of(Share(("a",), "", 3, 2), ["head"]), Share.of(cyclic_split(deal(1.0))[0], ["head"])]) == [
        (2, 3),
        (0, 0),
    ]


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    keys = {"client.local-steps": 8, "server.optimizer": "average", "server.fraction-evaluate": 0.0}
    return tiny_run(tmp_path_factory.mktemp("tiny")) | keys | {"num-server-rounds": 100, "client.batch-size": 4}


SPEEDS = ({"forward-ms": 1.0}, {"forward-ms": 1.2}, {"forward-ms": 4.0})


def first_round(folder: Path, run_config: dict[str, Any], **grid: Any) -> tuple[Federation, dict[int, Any]]:
    """One round of three clients, and what each of them sent."""
    federation, sent = Federation(folder, run_config), dict[int, Any]()

    def watch(partition: int, reply: Message) -> Message:
        sent[partition] = reply.content
        return reply

    federation.start(3, rounds=1, tamper=watch, **grid)
    return federation, sent


def test_a_slow_node_does_less_and_every_step_counts_the_same(run_config: dict, tmp_path: Path) -> None:
    """At 1, 1.2 and 4 ms, 8, 8 and 2 steps of an exact gradient, until the 1.2 ms of the second are over: 9.6 / 4. The
    mean is that of the changes as they are, as FedNova has it for one step size; the reference is a federation whose
    clients all take so many steps.
    """
    federation, sent = first_round(tmp_path / "run", run_config | {"method": "spry", "assign": "by-device"}, own=SPEEDS)
    assert [sent[client]["metrics"]["steps"] for client in range(3)] == [8, 8, 2]
    assert {sent[client]["metrics"]["steps-asked"] for client in range(3)} == {8}
    replies = {}
    for steps in (8, 2):
        keys = {"method": "fedavg", "gradient": "checkpointed-backprop", "client.local-steps": steps}
        replies[steps] = first_round(tmp_path / str(steps), run_config | keys)[1]
    wanted = [from_arrays(replies[steps][client]["arrays"]) for client, steps in enumerate((8, 8, 2))]
    for name, value in federation.strategy.snapshot().items():
        torch.testing.assert_close(value, sum(found[name] for found in wanted) / 3)
    now = federation.recorder.rounds[-1]
    assert (now.answered, now.partial, now.steps, now.steps_asked) == (3, 1, 18, 24)
    _it_is_written_down_and_shown(tmp_path / "run")


def _it_is_written_down_and_shown(folder: Path) -> None:
    (line,) = (json.loads(line) for line in (folder / "assignments.jsonl").read_text().splitlines())
    (hand,) = line["hands"]
    assert (hand["gradient"], hand["directions"], hand["steps"]) == ("checkpointed-backprop", 0, [8, 8, 2])
    crew = Crew(read_run(folder))
    found = work_table(crew)
    assert found is not None
    assert found[1] == [[str(c), "checkpointed-backprop", str(s), "1", "5"] for c, s in enumerate((8, 8, 2))]
    drawn = units_grid(crew)
    assert drawn is not None
    assert any("2 (checkpointed-backprop, 2 steps)" in tip.tip for tip in drawn.tips)
    page = render([folder])
    assert "How each client trained" in page
    assert "With less for slow nodes, 1 replies were of part of their local steps; in all, 18 of 24 were done." in page


def test_the_report_groups_what_a_client_did_by_its_gradient(tmp_path: Path) -> None:
    """Over two rounds with 4 and 2 steps of one kind and another kind in the third; and a line of before all this."""
    (tmp_path / "config.json").write_text("{}")
    about = {"units": ["a", "b"], "nodes": [{"node": "7", "partition": 0}]}
    (tmp_path / "run.json").write_text(json.dumps(about))
    slopes, exact = {"gradient": "forward-mode", "directions": 8}, {"gradient": "backprop", "directions": 0}
    hands = [{"units": [0], **slopes, "steps": [4]}, {"units": [1], **slopes, "steps": [2]}, {"units": [1], **exact}]
    hands += [{"units": [0]}]
    lines = [
        {"round": round_, "hands": [hand | {"nodes": ["7", "8"], "used": ["7"]}]}
        for round_, hand in enumerate(hands, start=1)
    ]
    (tmp_path / "assignments.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = work_table(Crew(read_run(tmp_path)))
    assert found is not None
    assert found[1] == [["0", "backprop", "-", "1", "1"], ["0", "forward-mode, 8 a batch", "2 to 4", "2", "2"]]


def test_scalars_of_fewer_steps_are_repeated_as_those_steps(run_config: dict, tmp_path: Path) -> None:
    """The reference are clients that send the weights to which the same steps led them."""
    keys = {"client.local-steps": 3, "client.directions": 1, "server.learning-rate": 1.0}
    results = []
    for method in ("fewer_steps", "fewer_slopes"):
        federation, sent = first_round(tmp_path / method, run_config | keys | {"method": f"mixed_fleet:{method}"})
        assert [sent[client]["metrics"]["steps"] for client in range(3)] == [1, 3, 3]
        assert federation.recorder.rounds[-1].answered == 3
        results.append(federation.strategy.snapshot())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)


def test_a_reply_of_other_steps_than_were_asked_is_refused() -> None:
    """Of 4 steps with 4 rows each, of which 3 were asked."""
    wanted = dataclasses.replace(ASKED, steps=4, examples=16, slopes=0, most_steps=3)
    sound = dataclasses.replace(SOUND, slopes=(), forwards=0.0, steps_asked=4)
    for steps, partial, refused in ((3, False, False), (4, False, True), (2, False, True), (2, True, False)):
        reply = dataclasses.replace(sound, steps=steps, examples=4 * steps)
        said = problem(reply, dataclasses.replace(wanted, partial=partial))
        assert bool(said) == refused and (not said or "at most 3" in said)
