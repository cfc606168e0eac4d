"""Slices chosen for a budget of memory: they fit, they are the fast ones, and they change no slope."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
from federation import make_checkpoint, make_rows
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from spry_app.autodiff.budget import SMALLEST, WORKSPACES, DoesNotFit, Slices, fit, halved
from spry_app.autodiff.directions import Seed
from spry_app.autodiff.memory import peak_mib
from spry_app.client.node import Node, load_node
from spry_app.client.slicing import slices_of, slices_to_score
from spry_app.client.step import Step
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import get_method

FEW = settings(max_examples=60, derandomize=True, deadline=None)


def linear(fixed: float, example: float, tangent: float) -> Any:
    """Memory as it is to a first approximation: examples times (value and tangents), beside temporaries."""

    def peak(slices: Slices) -> float:
        temporaries = slices.workspace_bytes / 2**20
        return fixed + temporaries + slices.micro_batch * example * (1 + slices.directions_at_once * tangent)

    return peak


@FEW
@given(
    batch=st.integers(1, 64),
    directions=st.integers(1, 32),
    budget=st.floats(1, 400),
    fixed=st.floats(0, 3),
    example=st.floats(0.1, 20),
    tangent=st.floats(0.1, 1.5),
)
def test_what_is_chosen_fits_and_could_not_be_much_larger(
    batch: int, directions: int, budget: float, fixed: float, example: float, tangent: float
) -> None:
    trials: list[Slices] = []
    memory = linear(fixed, example, tangent)

    def peak(slices: Slices) -> float:
        trials.append(slices)
        return float(memory(slices))

    try:
        chosen = fit(peak, batch, directions, budget)
    except DoesNotFit as error:
        assert error.least_mib == memory(Slices(1, 1, WORKSPACES[-1])) > budget
        return
    assert memory(chosen) <= budget
    assert 1 <= chosen.micro_batch <= batch and 1 <= chosen.directions_at_once <= directions
    assert len(trials) <= 16
    more = Slices(
        chosen.micro_batch + max(1, chosen.micro_batch // 8), chosen.directions_at_once, chosen.workspace_bytes
    )
    assert more.micro_batch > batch or memory(more) > budget
    if chosen.workspace_bytes < WORKSPACES[0]:
        assert memory(Slices(1, 1, chosen.workspace_bytes * 4)) > budget


def test_directions_come_before_examples_and_in_equal_chunks() -> None:
    assert fit(linear(0, 1, 1), batch=8, directions=8, budget_mib=8.0) == Slices(
        1, 4
    )  # five fit; 4 + 4 need no more passes
    assert fit(linear(0, 1, 1), batch=8, directions=8, budget_mib=1000.0) == Slices(8, 8)
    assert fit(linear(0, 1, 1), batch=8, directions=1, budget_mib=9.0) == Slices(3, 1)


def test_a_trial_without_memory_does_not_fit() -> None:
    """A step on n examples and k directions takes n k MiB, and there are 20."""
    trials: list[Slices] = []

    def peak(slices: Slices) -> float:
        trials.append(slices)
        takes = slices.micro_batch * slices.directions_at_once
        return takes if takes <= 20 else math.inf

    assert fit(peak, batch=64, directions=8, budget_mib=1000.0) == Slices(2, 8)
    assert fit(peak, batch=64, directions=64, budget_mib=1000.0) == Slices(1, 16)
    assert len(trials) <= 2 * 16


def test_less_and_less_ends_with_the_smallest() -> None:
    slices = [Slices(6, 3)]
    while slices[-1] != SMALLEST:
        slices.append(halved(slices[-1]))
    assert slices[1:5] == [Slices(3, 3), Slices(1, 3), Slices(1, 1), Slices(1, 1, WORKSPACES[1])]
    assert halved(SMALLEST) == SMALLEST


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    make_rows(folder / "rows.jsonl", 40)
    make_checkpoint(folder / "model")
    return folder


def config(folder: Path, budget: int | str = "", **keys: Any) -> RunConfig:
    flat = RunConfig.defaults() | {
        "model.name": str(folder / "model"),
        "data.source": str(folder / "rows.jsonl"),
        "data.partition": "iid",
        "client.batch-size": 32,
        "client.micro-batch": 5,
        "client.directions-at-once": 3,
        "client.memory-budget-mib": budget,
    }
    return RunConfig.from_flower(flat | keys)


def node_of(config: RunConfig, **stated: float) -> Node:
    own = {name.replace("_", "-"): value for name, value in stated.items()}
    return load_node(config, {"partition-id": 0, "num-partitions": 1, **own})


def slices(config: RunConfig, state: RecordDict | None = None, **stated: float) -> Slices:
    return slices_of(node_of(config, **stated), get_method(config), config, RecordDict() if state is None else state)


def measured(node: Node, config: RunConfig, slices: Slices) -> float:
    rows = node.train.by_length(range(len(node.train)))[-slices.micro_batch :]
    step = Step(node, get_method(config).gradient, set(), config.client.directions, slices)
    tensors = node.adapted.tensors()
    return peak_mib(lambda: step.estimate(rows, tensors, Seed(0, 0, 0, 0)), "cpu")


@pytest.mark.parametrize(
    "gradient", ["forward-mode", "central-difference", "backprop", "checkpointed-backprop", "bisected-backprop"]
)
def test_a_step_stays_within_what_its_node_states(folder: Path, gradient: str) -> None:
    settings = config(folder, **{"gradient": gradient, "method": "spry", "head-gradient": "forward"})
    whole = measured(node_of(settings), settings, Slices(32, 8))
    chosen = slices(settings, memory_budget_mib=whole / 3)
    assert chosen.micro_batch < 32
    assert whole / 8 < measured(node_of(settings), settings, chosen) <= whole / 3


def test_rows_are_scored_in_slices_and_to_the_same_sums(folder: Path) -> None:
    many = str(make_rows(folder / "many.jsonl", 400))
    keys: dict[str, Any] = {"data.source": many, "client.prefix-cache-mib": 0}
    settings = config(folder, **keys)
    node, peaks, scores = node_of(settings), [], []
    for at_once in (32, 2):
        score = functools.partial(node.score, settings.client, Slices(at_once, 1))
        scores.append(score())
        peaks.append(peak_mib(score, "cpu"))
    assert peaks[1] < peaks[0] / 4
    assert scores[0].examples == scores[1].examples > 32
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-5)


def test_the_run_config_gives_a_budget_to_nodes_that_state_none(folder: Path) -> None:
    assert slices(config(folder, budget=1)).micro_batch < 32
    assert slices(config(folder, budget="auto")) == Slices(32, 8)  # all that is asked for, as there is room enough


def test_without_a_budget_the_run_config_says(folder: Path) -> None:
    assert slices(config(folder)) == Slices(5, 3)
    assert slices(config(folder, **{"client.micro-batch": 0})) == Slices(32, 3)


def test_the_choice_is_kept_for_the_run(folder: Path) -> None:
    state = RecordDict()
    first = slices(config(folder, budget=1), state)
    assert slices(config(folder, budget=4), state) == first


def test_a_node_that_holds_no_step_scores_with_the_smallest_slices_and_does_not_try_again(folder: Path) -> None:
    """The second time its budget would hold one, which it does not look at."""
    state = RecordDict()
    for budget in (0.01, 4.0):
        node = node_of(config(folder), memory_budget_mib=budget)
        assert slices_to_score(node, get_method(config(folder)), config(folder), state) == SMALLEST
    assert slices_to_score(node, get_method(config(folder)), config(folder), RecordDict()) != SMALLEST


def test_a_budget_that_is_too_small_names_the_keys_and_what_is_needed(folder: Path) -> None:
    with pytest.raises(
        SpryError, match=r"takes 0\.\d MiB .* budget is 0\.0 MiB.*client\.memory-budget-mib.*memory-budget-mib"
    ):
        slices(config(folder), memory_budget_mib=0.01)
