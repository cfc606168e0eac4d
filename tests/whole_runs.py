"""Whole runs of a tiny model in this process, by the server's own `federate`: ended early, gone on with, rebuilt."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from federation import LocalGrid, same
from flwr.app import Message

from spry_app.config import RunConfig
from spry_app.models import save_adapter
from spry_app.protocol import from_arrays
from spry_app.server.rebuild import rebuild
from spry_app.server.run import Federated, federate

CLIENTS = 3


class Ending(LocalGrid):
    """The server dies when it has heard from the clients of round `last` and not yet averaged."""

    def __init__(self, last: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.last = last

    def send_and_receive(self, messages: Iterable[Message], timeout: float | None = None) -> Iterable[Message]:
        messages = list(messages)
        replies = super().send_and_receive(messages, timeout)
        if messages and messages[0].metadata.group_id == str(self.last):
            raise KeyboardInterrupt
        return replies


def start(run_config: dict[str, Any], folder: Path, grid: LocalGrid | None = None, **keys: Any) -> Federated:
    """grid: by default one of CLIENTS. keys: on top of the run config."""
    run_config = run_config | keys
    return federate(grid or LocalGrid(CLIENTS, run_config), RunConfig.from_flower(run_config), folder)  # type: ignore


def end_early(run_config: dict[str, Any], folder: Path, last: int, clients: int = CLIENTS, **grid: Any) -> None:
    """Where `Ending` does."""
    with pytest.raises(KeyboardInterrupt):
        start(run_config, folder, Ending(last, clients, run_config, **grid))


def rebuilt_where_resumed(run_config: dict[str, Any], folder: Path, last: int) -> Federated:
    """A run in `folder`/whole, and one in `folder`/parts that ended early: the same bits, of which the log tells."""
    whole = start(run_config, folder / "whole")
    end_early(run_config, folder / "parts", last)
    parts = start(run_config, folder / "parts", resume=str(folder / "parts"))
    assert same(from_arrays(whole.arrays), from_arrays(parts.arrays))
    save_adapter(parts.adapted, from_arrays(parts.arrays), folder / "saved")
    assert rebuild(folder / "parts" / "slopes.jsonl", folder / "rebuilt") == run_config["num-server-rounds"]
    one, other = ((folder / name / "adapter_model.safetensors").read_bytes() for name in ("saved", "rebuilt"))
    assert one == other
    return parts
