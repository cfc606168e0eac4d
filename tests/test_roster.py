"""What is written down of who took part is what the messages said; of a run that promises privacy, nothing."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from federation import Federation, LocalGrid, tiny_run
from flwr.app import Message

from spry_app.config import RunConfig
from spry_app.data import label_counts, load_corpus, load_shard
from spry_app.report import render
from spry_app.report.clients import Crew, units_grid
from spry_app.report.folder import read_run
from spry_app.server.roster import Roster, failed


class Watching(LocalGrid):
    """Keeps the units that each training message names, and loses every reply of the first node."""

    def __init__(self, run_config: dict[str, Any]) -> None:
        super().__init__(3, run_config, tamper=lambda partition, reply: reply if partition else None)
        self.seen: dict[tuple[int, str], list[str]] = {}

    def _deliver(self, message: Message) -> Message | None:
        if message.metadata.message_type == "train":
            told = message.content["config"]
            self.seen[int(told["round"]), str(message.metadata.dst_node_id)] = list(told["units"])
        return super()._deliver(message)


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_run(tmp_path_factory.mktemp("tiny")) | {"client.local-steps": 1, "client.directions": 1}


def run(run_config: dict[str, Any], folder: Path, labels: bool = False) -> Watching:
    federation, grid = Federation(folder, run_config), Watching(run_config)
    if labels:
        federation.recorder.roster.labels = functools.partial(label_counts, federation.config.data, 0)
    federation.run(grid, 2)
    return grid


def test_assignments_are_those_of_the_messages_and_a_lost_reply_counts_for_none(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    grid = run(run_config, tmp_path, labels=True)
    about = json.loads((tmp_path / "run.json").read_text())
    written = {}
    for line in map(json.loads, (tmp_path / "assignments.jsonl").read_text().splitlines()):
        for hand in line["hands"]:
            assert hand["used"] == [node for node in hand["nodes"] if node != "100"]
            written |= {
                (line["round"], node): [about["units"][unit] for unit in hand["units"]] for node in hand["nodes"]
            }
    assert written == grid.seen and len(written) == 6
    drawn = units_grid(Crew(read_run(tmp_path)))
    assert drawn is not None and [row[1:] for row in drawn.rows if row[0] == "head"] == [["1, 2", "1, 2"]]
    assert "no answer within server.round-timeout-s (600 s)" in render([tmp_path])


def test_labels_are_counted_as_the_nodes_hold_them_and_only_where_all_agree(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    run(run_config, tmp_path / "known", labels=True)
    config = RunConfig.from_flower(run_config)
    about = json.loads((tmp_path / "known" / "run.json").read_text())
    assert about["label-names"] == ["0", "1"]
    for node in about["nodes"]:
        shard = load_shard(config.data, config.seed, node["partition"], 3)
        held = [*shard.train["label"], *shard.heldout["label"]]
        assert node["labels"] == [held.count(0), held.count(1)]
    assert label_counts(config.data, 0, 3)[1] == [node["labels"] for node in about["nodes"]]  # type: ignore[index]
    run(run_config, tmp_path / "unknown")
    assert "labels" not in (tmp_path / "unknown" / "run.json").read_text()
    assert sum(map(sum, label_counts(config.data, 0, 3)[1])) == len(load_corpus(config.data).train)  # type: ignore[index]


@pytest.mark.parametrize("mode", ["central", "local"])
def test_of_a_private_run_no_node_is_kept(run_config: dict[str, Any], tmp_path: Path, mode: str) -> None:
    pytest.importorskip("dp_accounting")
    run(run_config | {"privacy.mode": mode}, tmp_path, labels=True)
    assert (tmp_path / "assignments.jsonl").read_text() == ""
    assert set(json.loads((tmp_path / "run.json").read_text())) == {"versions", "started"}
    assert "This run promises privacy" in render([tmp_path])


def test_a_run_that_goes_on_keeps_the_rounds_it_keeps_and_forgets_that_it_failed(tmp_path: Path) -> None:
    config, path = RunConfig(), tmp_path / "assignments.jsonl"
    Roster(tmp_path, config)
    failed(tmp_path, "no disk")
    assert json.loads((tmp_path / "run.json").read_text())["failed"] == "no disk"
    path.write_text("".join(f'{{"round": {number}, "hands": []}}\n' for number in (1, 2, 3)) + '{"rou')
    Roster(tmp_path, config, after=2)
    assert [json.loads(line)["round"] for line in path.read_text().splitlines()] == [1, 2]
    assert "failed" not in json.loads((tmp_path / "run.json").read_text())
    failed(tmp_path / "nowhere", "what has not begun leaves nothing")
    assert not (tmp_path / "nowhere").exists()
