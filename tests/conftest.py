"""What every test gets: an identity for Flower, one thread, no network; skips what this machine cannot run."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {
        "gpu": not torch.cuda.is_available() and "needs a CUDA device",
        "network": os.environ["HF_HUB_OFFLINE"] == "1" and "needs the Hub: set HF_HUB_OFFLINE=0",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def task_identity() -> Iterator[None]:
    """Flower stamps each new Message with the identity of the running task; outside a run there is none."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("run_id", "node_id", "task_id"):
            patch.setattr(TaskIdentity, f"_{name}", 1)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from more, and sums then have one order on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Slices of public data sets that are not part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no data sets in {SHARED_DATA}")
    return SHARED_DATA
