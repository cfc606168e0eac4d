"""A run that ended early goes on to the result, bit for bit, that it would have had."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import LocalGrid, make_rows, same, tiny_run
from flwr.app import Message
from safetensors import safe_open
from safetensors.torch import save_file
from whole_runs import CLIENTS, end_early, start

from spry_app.errors import SpryError
from spry_app.methods import METHODS
from spry_app.protocol import from_arrays
from spry_app.server.checkpoint import NAME
from spry_app.server.rebuild import rebuild

ROUNDS = 4
OTHER_IDS = (5009, 5006, 5003)


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    keys = {"num-server-rounds": ROUNDS, "server.evaluate-every": 2, "adapter.dropout": 0.1, "client.candidates": 4}
    keys |= {"server.fraction-train": 0.6, "client.directions-at-once": 2, "client.upper-directions": 2}
    return tiny_run(folder) | keys | {"data.test": str(make_rows(folder / "test.jsonl", 16, offset=500))}


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(method: str, run_config: dict, tmp_path: Path) -> None:
    """Killed in round 3 and again in round 4; other processes, so clients have forgotten, and other node ids."""
    run_config = run_config | {"method": method}
    whole = start(run_config, tmp_path / "whole")
    folder = tmp_path / "parts"
    end_early(run_config, folder, 3)
    again = run_config | {"resume": str(folder)}
    end_early(again, folder, 4, node_ids=OTHER_IDS)
    parts = start(again, folder)
    assert same(from_arrays(whole.arrays), from_arrays(parts.arrays))
    for line, other in zip(whole.recorder.rounds, parts.recorder.rounds, strict=True):
        assert (line.round, line.accuracy, line.loss, line.train_loss) == (
            (other.round, other.accuracy, other.loss, other.train_loss)
        )
        assert (line.mib_up, line.forwards, line.answered) == (other.mib_up, other.forwards, other.answered)
        assert METHODS[method].send == "log" or line.mib_down == other.mib_down
    assert [json.loads(line)["round"] for line in parts.recorder.metrics_path.read_text().splitlines()] == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_a_run_that_ended_can_have_more_rounds_and_its_log_tells_them_all(run_config: dict, tmp_path: Path) -> None:
    run_config = run_config | {"method": "spry-per-iteration"}
    whole = start(run_config, tmp_path / "whole")
    folder = tmp_path / "parts"
    start(run_config, folder, **{"num-server-rounds": 2})
    more = start(run_config, folder, resume=str(folder))
    assert same(from_arrays(whole.arrays), from_arrays(more.arrays))
    assert rebuild(folder / "slopes.jsonl", tmp_path / "adapter") == ROUNDS


def test_a_round_that_changed_nothing_counts_as_one(run_config: dict, tmp_path: Path) -> None:
    """Nobody answers in round 2; the run goes on with round 3, and with the barren rounds before it."""

    def lose(partition: int, reply: Message) -> Message | None:
        return None if reply.metadata.group_id == "2" else reply

    run_config = run_config | {"method": "spry-per-iteration"}
    whole = start(run_config, tmp_path / "whole", LocalGrid(CLIENTS, run_config, tamper=lose))
    folder = tmp_path / "parts"
    end_early(run_config, folder, 3, tamper=lose)
    parts = start(run_config, folder, resume=str(folder))
    assert same(from_arrays(whole.arrays), from_arrays(parts.arrays))
    assert [line.answered for line in parts.recorder.rounds] == [0, 2, 0, 2, 2]


def test_lines_that_were_cut_short_are_written_again(run_config: dict, tmp_path: Path) -> None:
    """A disk that is full, or a process that is killed, may leave a part of a line."""
    run_config = run_config | {"method": "spry-per-iteration"}
    whole = start(run_config, tmp_path / "whole")
    folder = tmp_path / "parts"
    end_early(run_config, folder, 3)
    for name in ("metrics.jsonl", "slopes.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"round": 3, "rou')
    parts = start(run_config, folder, resume=str(folder))
    assert same(from_arrays(whole.arrays), from_arrays(parts.arrays))
    for name in ("metrics.jsonl", "slopes.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        assert [line["round"] for line in lines if "round" in line][-ROUNDS:] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"client.learning-rate": 0.5}, r"client\.learning-rate=0\.5 \(it was 0\.05\): the result would be that of"),
        ({"num-server-rounds": 2}, r"has run its 2 rounds; to go on, raise num-server-rounds \(now 2\)"),
        ({"resume": "/no/such/run"}, r"resume='/no/such/run' is not the folder of a run"),
    ],
)
def test_what_cannot_be_resumed_is_refused(keys: dict, sentence: str, run_config: dict, tmp_path: Path) -> None:
    start(run_config, tmp_path, **{"num-server-rounds": 2})
    again = run_config | {"resume": str(tmp_path)} | keys
    with pytest.raises(SpryError, match=sentence):
        start(again, Path(str(again["resume"])))


def test_a_checkpoint_that_cannot_be_read_is_refused(run_config: dict, tmp_path: Path) -> None:
    start(run_config, tmp_path, **{"num-server-rounds": 2})
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:-40])
    with pytest.raises(SpryError, match=f"its {NAME} cannot be read"):
        start(run_config, tmp_path, resume=str(tmp_path))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda groups, progress: change(groups, torch.zeros(1)), "is of another model"),
        (lambda groups, progress: change(groups, torch.tensor(math.nan)), "is of another model"),
        (lambda groups, progress: change(groups, None), "is of another model"),
        (lambda groups, progress: groups.update({"moments:m/x": torch.zeros(1)}), "'x' of shape"),
        (
            lambda groups, progress: groups.update({"moments:" + first(groups, "moments"): torch.tensor(math.nan)}),
            "finite",
        ),
        (lambda groups, progress: groups.update({"update:x": torch.zeros(1)}), "last update is not one of its tensors"),
        (lambda groups, progress: progress.update({"round": -1}), "its rounds are"),
        (lambda groups, progress: progress.update({"round": "1"}), "its rounds are"),
        (lambda groups, progress: progress.clear(), "cannot be read"),
    ],
)
def test_a_checkpoint_of_other_tensors_is_refused(spoil: Any, sentence: str, ended: tuple, tmp_path: Path) -> None:
    run_config, folder = ended[0], tmp_path / "run"
    shutil.copytree(ended[1], folder)
    with safe_open(folder / NAME, framework="pt") as file:
        progress = json.loads(file.metadata()["progress"])
        groups = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    spoil(groups, progress)
    save_file(groups, folder / NAME, {"progress": json.dumps(progress)})
    with pytest.raises(SpryError, match=sentence):
        start(run_config, folder, resume=str(folder))


def change(groups: dict[str, Any], to: torch.Tensor | None) -> None:
    """One tensor, or take it away, in a checkpoint that tells of no update."""
    for key in [key for key in groups if key.startswith("update")]:
        del groups[key]
    key = f"tensors:{first(groups)}"
    groups.pop(key) if to is None else groups.update({key: to})


def first(groups: dict[str, Any], group: str = "tensors") -> str:
    """Name of one tensor in a group."""
    return next(key.partition(":")[2] for key in sorted(groups) if key.startswith(group))


@pytest.mark.parametrize("text", ["[]", "{}", "[[[", "7", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_folder_whose_json_is_not_that_of_a_run_is_refused(
    name: str, text: str, ended: tuple, tmp_path: Path
) -> None:
    run_config, folder = ended[0], tmp_path / "run"
    shutil.copytree(ended[1], folder)
    (folder / name).write_text(text)
    with pytest.raises(SpryError, match=r"cannot be resumed|is not the folder of a run"):
        start(run_config, folder, resume=str(folder))


@pytest.fixture(scope="module")
def ended(run_config: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run of two rounds, and the keys to go on with."""
    folder = tmp_path_factory.mktemp("ended")
    start(run_config, folder, **{"num-server-rounds": 2})
    return run_config, folder
