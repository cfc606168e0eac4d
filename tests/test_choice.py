"""gradient="auto": one gradient for all nodes, as the planner advises for their least memory; kept by the run."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from federation import Federation, LocalGrid, make_rows, same, tiny_run
from flwr.app import Message
from whole_runs import Ending

from spry_app.autodiff.gradients import GRADIENTS
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import METHODS, Share, get_method
from spry_app.planner.choice import _rows, advise_all
from spry_app.protocol import from_arrays
from spry_app.server.choice import NAME, Choice, OneGradient
from spry_app.server.crew import crew
from spry_app.server.run import Federated, federate

ALL = tuple(GRADIENTS)
ROOMY = {"memory-budget-mib": 64.0}
"""For any step of the tiny model."""


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    keys = {"gradient": "auto", "data.max-length": 16, "client.directions-at-once": 2}
    return tiny_run(folder) | keys | {"data.test": str(make_rows(folder / "test.jsonl", 16, offset=500))}


def config(run_config: dict[str, Any], **keys: Any) -> RunConfig:
    return RunConfig.from_flower(run_config | keys)


class Watching(Ending):
    """Remembers what each client was told to take."""

    def __init__(self, *args: Any, last: int = 99, **kwargs: Any) -> None:
        super().__init__(last, *args, **kwargs)
        self.told: list[str] = []

    def send_and_receive(self, messages: Iterable[Message], timeout: float | None = None) -> Iterable[Message]:
        messages = list(messages)
        self.told += [str(m.content["config"]["gradient"]) for m in messages if m.metadata.message_type == "train"]
        return super().send_and_receive(messages, timeout)


def start(run_config: dict[str, Any], folder: Path, **grid: Any) -> tuple[Federated, Watching]:
    local = Watching(3, run_config, **grid)
    return federate(local, RunConfig.from_flower(run_config), folder, advise=advise_all), local  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["spry", "spry-per-iteration", "fedsgd"])
def test_a_run_is_that_of_the_gradient_it_chose_to_the_bit(method: str, run_config: dict, tmp_path: Path) -> None:
    """An exact gradient where nodes have room; slopes, whatever the room, where replies are slopes."""
    run_config = run_config | {"method": method} | ({"server.optimizer": "sgd"} if method == "fedsgd" else {})
    own = (ROOMY,) * 3
    done, grid = start(run_config, tmp_path / "auto", own=own)
    (chosen,) = set(grid.told)
    assert chosen == ("forward-mode" if METHODS[method].reply == "slopes" else "backprop")
    assert done.method.gradient.name == chosen
    kept = json.loads((tmp_path / "auto" / NAME).read_text())
    assert kept["gradient"] == chosen and kept["reason"].startswith(f"{chosen}: ")
    named, _ = start(run_config | {"gradient": chosen}, tmp_path / "named", own=own)
    assert same(from_arrays(done.arrays), from_arrays(named.arrays))


def test_the_least_memory_decides_between_what_it_holds(run_config: dict) -> None:
    """Just above the smallest step of each kind; an exact gradient where one fits, the one with fewer passes first. On
    two blocks bisection and checkpoints take as many.
    """
    exact, settings = ["backprop", "bisected-backprop", "checkpointed-backprop"], config(run_config)
    order = [*exact, "forward-mode", "central-difference"]
    smallest = {row.gradient: row.total_mib for row in _rows(settings, 1e-3, 3, order)}
    assert smallest["backprop"] > smallest["bisected-backprop"] > smallest["central-difference"]
    for kind in ("backprop", "bisected-backprop", "central-difference"):
        limit = 1.001 * smallest[kind]
        found = advise_all(settings, [limit, 64.0, 2 * limit], [ALL] * 3)
        assert found.gradient == next(kind for kind in order if smallest[kind] <= limit)
    least = 0.99 * min(smallest.values())
    with pytest.raises(SpryError, match=r"The least is that of central-difference .* Raise client.memory-budget-mib"):
        advise_all(settings, [64.0, least], [ALL] * 2)


@pytest.mark.parametrize("budget", [64, "auto"])
def test_the_budget_of_the_run_is_that_of_nodes_that_state_none(budget: Any, run_config: dict, tmp_path: Path) -> None:
    """Who says so is the node: with "auto" it is half of what it has free itself."""
    keys = {"client.memory-budget-mib": budget, "num-server-rounds": 1}
    _, grid = start(run_config | keys, tmp_path, own=({}, {}, {"memory-budget-mib": 0.025}))
    assert set(grid.told) == {"central-difference"}
    assert set(start(run_config | keys, tmp_path / "roomy")[1].told) == {"backprop"}
    said = [node["memory-mib"] for node in json.loads((tmp_path / "run.json").read_text())["nodes"]]
    assert said[2] == 0.025 and all(mib == 64 if budget == 64 else mib > 64 for mib in said[:2])


def test_of_nodes_that_say_nothing_nothing_can_be_chosen(run_config: dict) -> None:
    with pytest.raises(SpryError, match=r"nobody has said how much that is: set client.memory-budget-mib"):
        advise_all(config(run_config), [0.0, 0.0], [ALL] * 2)


def test_only_what_every_node_can_take_is_chosen(run_config: dict) -> None:
    settings = config(run_config)
    without = ("forward-mode", "central-difference", "checkpointed-backprop")
    assert advise_all(settings, [64.0] * 2, [ALL, without]).gradient == "checkpointed-backprop"
    with pytest.raises(SpryError, match="no gradient that all 2 nodes and method='spry' can take"):
        advise_all(settings, [64.0] * 2, [("backprop",), ("forward-mode",)])
    slopes = config(run_config, method="spry-per-iteration")
    with pytest.raises(SpryError, match="All nodes can take backprop: set gradient to one of them"):
        advise_all(slopes, [64.0], [("backprop",)])


def test_a_resumed_run_keeps_to_its_choice_and_asks_for_no_other(run_config: dict, tmp_path: Path) -> None:
    run_config = run_config | {"num-server-rounds": 3, "server.evaluate-every": 1}
    whole, _ = start(run_config, tmp_path / "whole", own=(ROOMY,) * 3)
    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        start(run_config, folder, own=(ROOMY,) * 3, last=3)

    def never(*args: Any) -> Choice:
        raise AssertionError("a run that has chosen does not ask again")

    again = run_config | {"resume": str(folder)}
    grid = Watching(3, again, own=(ROOMY,) * 3)
    parts = federate(grid, RunConfig.from_flower(again), folder, advise=never)  # type: ignore[arg-type]
    assert set(grid.told) == {"backprop"}
    assert same(from_arrays(whole.arrays), from_arrays(parts.arrays))


def test_a_choice_that_cannot_be_read_ends_a_resumed_run(run_config: dict, tmp_path: Path) -> None:
    again = config(run_config, resume=str(tmp_path))
    assert OneGradient(again, tmp_path, advise_all).gradient == ""
    for text in ("{", '{"gradient": "psychic", "reason": ""}', "[]"):
        (tmp_path / NAME).write_text(text)
        with pytest.raises(SpryError, match=f"{NAME} cannot be read"):
            OneGradient(again, tmp_path, advise_all)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"assign": "by-device"}, "assign='by-device' one for each"),
        (
            {"privacy.mode": "local", "privacy.unit": "example"},
            'gradient="auto" leaves open which',
        ),
    ],
)
def test_where_one_gradient_cannot_be_left_open_a_sentence_says_so(run_config: dict, keys: dict, says: str) -> None:
    with pytest.raises(SpryError, match=says):
        get_method(config(run_config, **keys))


def test_without_the_planner_nothing_is_chosen(run_config: dict, tmp_path: Path) -> None:
    grid = LocalGrid(3, run_config)
    with pytest.raises(SpryError, match="name a gradient"):
        federate(grid, RunConfig.from_flower(run_config), tmp_path)  # type: ignore[arg-type]


def test_who_is_to_do_less_does_less_of_the_chosen_gradient(run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config | {"gradient": "forward-mode"})
    strategy = federation.strategy
    nodes = strategy.fleet.available(LocalGrid(3, run_config | {"gradient": "forward-mode"}))  # type: ignore[arg-type]
    strategy.fleet.choose = lambda memory, kinds: "central-difference"
    less = Share(strategy.units, directions=1, steps=1)
    found = crew(federation.config, strategy.method, strategy.state, strategy.fleet, nodes, lambda *_: [less] * 3, 1)
    assert [(share.gradient, share.directions, share.steps) for share in found.shares] == [
        ("central-difference", 1, 1)
    ] * 3
