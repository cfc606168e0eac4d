"""docs/extending.md: each file of the page, outside the package, in a federation of three clients in one process."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import LocalGrid, make_checkpoint, make_rows
from flwr.app import Context, Message, RecordDict
from pages import DOCS, write_files
from safetensors.torch import load_file
from transformers import pipeline

from spry_app.errors import SpryError
from spry_app.server.export import export
from spry_app.server.run import run

PAGE = DOCS / "extending.md"
CLIENTS = 3


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of the page, from which they are imported."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    for name in write_files(PAGE, folder):
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    return folder


def start(tmp_path: Path, grid: dict[str, Any] | None = None, **keys: Any) -> Path:
    """A run of two short rounds; its folder."""
    run_config = {
        "model.name": str(make_checkpoint(tmp_path / "tiny")),
        "data.source": str(make_rows(tmp_path / "rows.jsonl", 48)),
        "data.partition": "iid",
        "client.local-steps": 1,
        "client.directions": 2,
        "num-server-rounds": 2,
        "server.evaluate-every": 1,
        "output-dir": str(tmp_path / "outputs"),
        **keys,
    }
    context = Context(run_id=7, node_id=0, node_config={}, state=RecordDict(), run_config=run_config)
    run(LocalGrid(CLIENTS, run_config, **(grid or {})), context)  # type: ignore[arg-type]
    return tmp_path / "outputs" / "7"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_method_is_at_most_forty_lines_and_two_clients_train_each_unit(own: Path, tmp_path: Path) -> None:
    assert len((own / "my_method.py").read_text().splitlines()) <= 40
    folder = start(tmp_path, method="my_method:paired")
    for line in lines(folder / "assignments.jsonl"):
        assert sorted(len(hand["nodes"]) for hand in line["hands"]) == [1, 2]
        assert {len(hand["units"]) for hand in line["hands"]} == {2}  # one, and the head, which all train
    assert lines(folder / "metrics.jsonl")[-1]["answered"] == CLIENTS


def test_the_task_learns_grades_by_forward_mode_and_what_it_learned_can_be_exported(own: Path, tmp_path: Path) -> None:
    """Sentences with the grade 0.9 for praise and 0.2 for the rest: a constant answer is 0.35 away on average."""
    make_rows(tmp_path / "labelled.jsonl", 96)
    graded = [
        {"text": row["text"], "grade": 0.9 if row["label"] else 0.2} for row in lines(tmp_path / "labelled.jsonl")
    ]
    random.Random(0).shuffle(graded)
    for name, rows in (("train", graded[:64]), ("test", graded[64:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"data.task": "grading:GRADING", "data.label-field": "grade", "data.source": str(tmp_path / "train.jsonl")}
    keys |= {"data.test": str(tmp_path / "test.jsonl"), "client.local-steps": 16, "num-server-rounds": 2}
    keys |= {"client.directions": 4, "client.learning-rate": 0.05, "client.optimizer": "adam", "adapter.rank": 4}
    folder = start(tmp_path, method="spry", **keys, **{"server.optimizer": "average"})
    first, *_, last = lines(folder / "metrics.jsonl")
    assert last["main-metric"] == "closeness"
    assert first["metrics"]["closeness"] < 0.75 and last["metrics"]["closeness"] > 0.8
    assert last["refused"] == 0 and last["loss"] < first["loss"]
    export(folder, tmp_path / "merged", dtype="fp32")
    ask = pipeline("text-classification", str(tmp_path / "merged"), function_to_apply="sigmoid")
    errors = [abs(ask(row["text"])[0]["score"] - row["grade"]) for row in graded[64:]]
    assert 1 - sum(errors) / len(errors) == pytest.approx(last["metrics"]["closeness"], abs=1e-4)


def test_the_task_refuses_what_is_no_grade(own: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "good", "grade": 7.5}\n' * 4)
    keys = {"data.source": str(tmp_path / "train.jsonl"), "data.label-field": "grade"}
    with pytest.raises(SpryError, match=r"data\.label-field 'grade' of data\.source .* must hold numbers from 0 to 1"):
        start(tmp_path, method="spry", **keys, **{"data.task": "grading:GRADING"})


def test_the_strategy_takes_the_median_of_what_clients_send(own: Path, tmp_path: Path) -> None:
    """One of three asks for the moon, which moves a mean, and no median."""
    sent: list[dict[str, torch.Tensor]] = []

    def moon(partition: int, reply: Message) -> Message:
        tensors = reply.content["arrays"].to_torch_state_dict()
        if partition == 0:
            tensors = {name: value + 1e6 for name, value in tensors.items()}
            reply.content["arrays"] = type(reply.content["arrays"])(tensors)
        sent.append(tensors)
        return reply

    folder = start(
        tmp_path,
        {"tamper": moon},
        method="fedfgd",
        strategy="median:Median",
        **{"server.optimizer": "average", "num-server-rounds": 1},
    )
    found = load_file(folder / "checkpoint.safetensors")
    assert len(sent) == CLIENTS
    for name in sent[0]:
        expected = torch.stack([tensors[name] for tensors in sent]).sort(dim=0).values[1]
        assert torch.allclose(found[f"tensors:{name}"], expected, atol=1e-5), name


def test_the_strategy_refuses_what_it_would_break(own: Path, tmp_path: Path) -> None:
    with pytest.raises(SpryError, match="needs a method that replies with tensors"):
        start(tmp_path, strategy="median:Median", method="spry-per-iteration")
    with pytest.raises(SpryError, match="whose noise Spry's own Strategy adds to the mean"):
        start(tmp_path, strategy="median:Median", method="fedfgd", **{"privacy.mode": "central"})


def test_the_sink_is_told_every_round(own: Path, tmp_path: Path) -> None:
    folder = start(tmp_path, method="spry", **{"telemetry.sinks": "my_sink:Printed"})
    told = [line.split() for line in (folder / "printed.txt").read_text().splitlines()]
    assert [(int(number), float(seconds)) for number, seconds, _ in told] == [
        (line["round"], line["seconds"]) for line in lines(folder / "metrics.jsonl")
    ]
