"""Federations on LoRA of few coordinates: every method, resuming, rebuilding, the frame that the server sends."""

from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, LocalGrid, make_rows, tiny_run
from safetensors.torch import load_file, save_file
from tiny_checkpoints import MAPS
from whole_runs import rebuilt_where_resumed, start

from spry_app.errors import SpryError
from spry_app.methods import METHODS
from spry_app.protocol import from_arrays, to_arrays
from spry_app.server.frame_file import NAME as FRAME
from spry_app.server.rebuild import rebuild


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    keys = {"client.candidates": 4, "client.upper-directions": 2, "client.directions-at-once": 2}
    return tiny_run(folder) | keys | {"data.test": str(make_rows(folder / "test.jsonl", 16, offset=500))}


def _adapter(kind: str) -> dict[str, Any]:
    return {f"adapter.{key}": value for key, value in MAPS[kind].items()}


CASES = [(method, kind) for method in METHODS for kind in ("core", "shared")]
CASES += [("spry-per-iteration", kind) for kind in ("singular", "combined", "random")]


@pytest.mark.parametrize(("method", "kind"), [case for case in CASES if case != ("fedspzo", "shared")])
def test_a_round_of_every_method_changes_every_coordinate(
    method: str, kind: str, run_config: dict, tmp_path: Path
) -> None:
    federation = Federation(tmp_path, run_config | _adapter(kind) | {"method": method, "client.local-steps": 1})
    before = federation.strategy.snapshot()
    federation.start(2, rounds=1)
    line = federation.recorder.rounds[-1]
    assert (line.answered, line.refused) == (2, 0)
    after = federation.strategy.snapshot()
    assert not any(torch.equal(after[name], value) for name, value in before.items())


def test_a_vector_that_moves_both_halves_cannot_be_cut_in_two(run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config | _adapter("shared") | {"method": "fedspzo"})
    with pytest.raises(SpryError, match=r"cannot be cut at block 1 .*adapter\.subspace to \"none\" or \"core\""):
        federation.start(2)


def test_a_federation_learns_by_more_than_its_head(run_config: dict, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"method": "spry-per-iteration", "client.directions": 8, "client.directions-at-once": 8}
    keys |= {"num-server-rounds": 10, "server.evaluate-every": 10, "client.local-steps": 1, "client.micro-batch": 0}
    results = {}
    for kind, rate in (("shared", 1e-9), ("shared", 0.5), ("combined", 0.5)):
        rates = {"server.learning-rate": rate, "server.head-learning-rate": 0.003}
        federation = Federation(tmp_path / f"{kind}{rate}", run_config | _adapter(kind) | keys | rates)
        federation.start(2)
        results[kind, rate] = sum(line.train_loss for line in federation.recorder.rounds[-5:])
    head_alone = results.pop(("shared", 1e-9))
    assert max(results.values()) < 0.9 * head_alone


@pytest.mark.parametrize("kind", ["singular", "random"])
def test_a_run_is_resumed_and_rebuilt_to_the_byte(kind: str, run_config: dict, tmp_path: Path) -> None:
    run_config = run_config | _adapter(kind) | {"method": "spry-per-iteration", "num-server-rounds": 3}
    rebuilt_where_resumed(run_config, tmp_path, 2)
    assert (tmp_path / "parts" / FRAME).exists() == (kind == "singular")


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x" * 40)])
def test_a_run_without_its_frame_cannot_be_rebuilt(spoil: Any, run_config: dict, tmp_path: Path) -> None:
    start(run_config | _adapter("singular") | {"method": "spry-per-iteration", "num-server-rounds": 1}, tmp_path)
    spoil(tmp_path / FRAME)
    with pytest.raises(SpryError, match=r"frame\.safetensors cannot be read .*keeps its fixed factors there"):
        rebuild(tmp_path / "slopes.jsonl", tmp_path / "adapter")


def test_another_frame_in_the_folder_is_told_from_another_model(run_config: dict, tmp_path: Path) -> None:
    start(run_config | _adapter("singular") | {"method": "spry-per-iteration", "num-server-rounds": 1}, tmp_path)
    tensors = load_file(tmp_path / FRAME)
    save_file({name: value * 1.001 for name, value in tensors.items()}, tmp_path / FRAME)
    with pytest.raises(SpryError, match="The fixed part of the adapter here is not that of the run"):
        rebuild(tmp_path / "slopes.jsonl", tmp_path / "adapter")


def test_the_frame_is_sent_once_and_again_to_a_node_that_lost_it_or_holds_another(
    run_config: dict, tmp_path: Path
) -> None:
    """Counted by hand: 4 matrices of 32 x 32, two frames of 3 rows each, fp32; to 3 nodes, and to 2 of them again."""
    federation = Federation(tmp_path, run_config | _adapter("singular") | {"method": "spry-per-iteration"})
    sent: list[int] = []

    class Grid(LocalGrid):
        def send_and_receive(self, messages: Any, timeout: float | None = None) -> Any:
            messages = list(messages)
            sent.extend(m.metadata.dst_node_id for m in messages if "frame" in m.content)
            if messages and messages[0].metadata.group_id == "2" and messages[0].metadata.message_type == "train":
                nodes = list(self.contexts)
                del self.contexts[nodes[0]].state["frame"]
                kept = self.contexts[nodes[1]].state
                kept["frame"] = to_arrays({name: v + 1e-3 for name, v in from_arrays(kept["frame"]).items()})
            return super().send_and_receive(messages, timeout)

    grid = Grid(3, federation.run_config)
    federation.run(grid, 3)
    nodes = list(grid.contexts)
    assert sent == [*nodes, *nodes[:2]]
    lines = federation.recorder.rounds
    assert [line.answered for line in lines] == [0, 3, 1, 3]
    reasons = sorted(reason.partition(": ")[2] for reason in lines[2].reasons)
    assert reasons[0].startswith("The fixed part of the adapter of this node is not the server's (fingerprint ")
    assert reasons[1].startswith("This node does not hold the frame of the run (adapter.frame='singular')")
    frame_bytes = 4 * 2 * 3 * 32 * 4
    plain = Federation(tmp_path / "core", run_config | _adapter("core") | {"method": "spry-per-iteration"})
    plain.start(3, 1)
    more = (lines[1].mib_down - plain.recorder.rounds[1].mib_down) * 2**20
    assert 0 < more - 3 * frame_bytes < 3 * 8 * 300  # names and headers


def test_a_node_with_another_seed_is_told_that_it_is_the_adapter(run_config: dict, tmp_path: Path) -> None:
    federation = Federation(tmp_path, run_config | _adapter("shared") | {"server.min-available-nodes": 3})
    grid = LocalGrid(3, federation.run_config)
    list(grid.contexts.values())[1].run_config["seed"] = 5
    with pytest.raises(SpryError, match=r"2 of 3 connected(?s:.)*The fixed part of the adapter of this node is not"):
        federation.run(grid, 1)


@pytest.mark.parametrize("kind", ["combined", "shared"])
def test_what_is_computed_once_changes_nothing(kind: str, run_config: dict, tmp_path: Path) -> None:
    """Hidden states below the lowest matrix that the coordinates move, with units dealt by depth; nf4."""
    keys = {"adapter.targets": "layer.1.attention.self.query,layer.1.attention.self.value", "assign": "by-depth"}
    keys |= {"model.quantization": "nf4", "method": "spry", "client.directions-at-once": 1}
    results = []
    for mib in (0, 64):
        run = run_config | _adapter(kind) | keys | {"client.prefix-cache-mib": mib}
        federation = Federation(tmp_path / str(mib), run)
        federation.start(2, rounds=4)  # groups of rows are computed whole, which later rounds make up for
        results.append((federation.strategy.snapshot(), federation.recorder.rounds[-1].forwards))
    assert results[1][1] < results[0][1]
    for name, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][name], rtol=1e-3, atol=1e-4)
