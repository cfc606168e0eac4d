"""What every test gets: an identity for Flower, one thread, no network; skips what this machine cannot run. And what
more than one file of tests asks for.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

import datasets
import pytest
import torch
from hypothesis import settings
from rows import ROWS, write
from tiny_checkpoints import write_checkpoint

from benchmarks.local_grid import identify

settings.register_profile("spry", deadline=None)  # a busy machine is no fault
settings.load_profile("spry")

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"


DAILY = {
    "test_every_method.py::test_a_federation_learns": {"spry", "decomfl"},
    "test_every_method.py::test_what_travels_is_what_was_counted_by_hand": {
        "spry",
        "spry-per-iteration",
        "fedsgd",
        "decomfl",
        "fedspzo",
    },
    "test_every_method.py::test_the_same_seed_gives_the_same_bits_though_a_reply_is_missing_and_one_is_broken": {
        "spry",
        "spry-per-iteration",
        "fwdllm",
    },
    "test_resume.py::test_a_resumed_run_is_the_uninterrupted_one_to_the_bit": {"spry", "decomfl", "fedavg"},
    "test_privacy_in_rounds.py::test_every_method_runs_with_it_or_says_why_not": {"spry-central", "fedspzo-local"},
    "test_privacy_by_example.py::test_every_method_runs_with_it_or_says_why_not": {"spry", "fedavg", "fedspzo"},
    "test_noise_in_rounds.py::test_every_round_says_how_much_of_it_was_noise": {"spry", "fedavg"},
    "test_noise_in_rounds.py::test_whoever_follows_the_log_scales_to_the_same_bits": {
        "spry-per-iteration-gaussian",
        "decomfl-orthogonal",
        "fedspzo-gaussian",
    },
    "test_orthogonal.py::test_the_log_and_the_weights_give_the_same_run_to_the_bit": {"spry-per-iteration", "decomfl"},
    "test_subspace_runs.py::test_a_run_is_resumed_and_rebuilt_to_the_byte": {"singular"},
    "test_subspace_runs.py::test_a_round_of_every_method_changes_every_coordinate": {
        "spry-shared",
        "decomfl-core",
        "spry-per-iteration-singular",
    },
    "test_choice.py::test_a_run_is_that_of_the_gradient_it_chose_to_the_bit": {"spry-per-iteration"},
    "test_choice.py::test_the_budget_of_the_run_is_that_of_nodes_that_state_none": {"auto"},
    "test_schedule.py::test_a_resumed_run_keeps_the_scale": {"decomfl"},
    "test_by_device.py::test_a_run_measures_its_own_steps": {"server"},
    "test_budget.py::test_a_step_stays_within_what_its_node_states": {"forward-mode"},
    "test_given.py::test_a_run_goes_on_from_the_adapter_of_another": {"lora", "prefix"},
    "test_export.py::test_an_adapter_and_its_merge_give_the_last_evaluation_of_the_run": {"lora", "core"},
    "test_export.py::test_the_adapter_is_there_after_every_round_and_whole": {"lora", "core"},
}
"""Contracts over a whole table, each a run or two a row: the rows of them that are not slow."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    there: dict[str, set[str]] = {}
    for item in items:
        file, _, test = item.nodeid.rpartition("/")[2].partition("::")
        name, _, row = test.partition("[")
        table, row = f"{file}::{name}", row.removesuffix("]")
        there.setdefault(table, set()).add(row)
        if row and row not in DAILY.get(table, {row}):
            item.add_marker(pytest.mark.slow)
    files = {table.partition("::")[0] for table in there}
    expected = {table: rows for table, rows in DAILY.items() if table.partition("::")[0] in files}
    absent = {table: gone for table, rows in expected.items() if (gone := rows - there.get(table, set()))}
    if absent and not any("::" in argument for argument in config.args):  # those choose rows themselves
        raise pytest.UsageError(f"DAILY names rows that are not there: {absent}")
    missing = {
        "gpu": not torch.cuda.is_available() and "needs a CUDA device",
        "network": os.environ["HF_HUB_OFFLINE"] == "1" and "needs the Hub: set HF_HUB_OFFLINE=0",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def task_identity() -> None:
    identify()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from more, and sums then have one order on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def what_is_imported_is_not_looked_through_again() -> None:
    """Else collecting what is dead, as whoever measures memory does first, takes as long as a round on a tiny model."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_rows_at_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where rows and tokens are kept; of the processes that tests start, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPRY_CACHE", str(tmp_path_factory.mktemp("spry-cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Slices of public data sets that are not part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no data sets in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of `datasets` for one file of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with the rows of rows.py."""
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny BERT."""
    return write_checkpoint(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where nodes keep the key of their noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where rows and tokens of this test are kept."""
    monkeypatch.setenv("SPRY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"
