"""A run's numbers reach every sink that is named, from files read back; a sink can refuse to begin, and then only."""

import json
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from federation import make_checkpoint, make_rows
from flwr.app import Context, RecordDict

from benchmarks.local_grid import LocalGrid
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.server.run import run
from spry_app.server.telemetry import numbers, opened

ROOT = Path(__file__).parent.parent
OWN = '''
"""A sink of a user's own, which writes lines to a file, or fails when it is told to."""
import json

class Lines:
    def __init__(self, folder, config):
        self.file = (folder / "lines.jsonl").open("w")
        self.write({"config": config})
    def write(self, line):
        self.file.write(json.dumps(line) + "\\n")
    def round(self, number, values):
        self.write({"round": number, **values})
    def end(self, completed):
        self.write({"completed": completed})
        self.file.close()

class Fails(Lines):
    def round(self, number, values):
        if number == 1:
            raise ConnectionError("the line is dead")
        super().round(number, values)

def cannot_begin(folder, config):
    raise PermissionError("no key")

def needs(folder, config):
    import a_package_that_is_nowhere

def nothing(folder, config):
    return 3
'''
LINE = {
    "round": 3,
    "rounds": 5,
    "loss": 0.5,
    "accuracy": None,
    "asked": 4,
    "noise": {"cosine": 0.25, "units": {"head": {"cosine": 1.0}}},
    "reasons": ["node 1: gone"],
}


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_sinks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_sinks", None)


def config(sinks: str) -> RunConfig:
    return RunConfig.from_flower({"telemetry.sinks": sinks, "num-server-rounds": 5})


def start(tmp_path: Path, sinks: str, **keys: Any) -> Path:
    """A whole run of one round in this process; its folder."""
    run_config = {
        "method": "fedsgd",
        "model.name": str(make_checkpoint(tmp_path / "tiny")),
        "data.source": str(make_rows(tmp_path / "rows.jsonl", 48)),
        "data.test": str(make_rows(tmp_path / "test.jsonl", 16, offset=500)),
        "data.num-labels": 2,
        "data.partition": "iid",
        "num-server-rounds": 1,
        "output-dir": str(tmp_path / "outputs"),
        "telemetry.sinks": sinks,
        **keys,
    }
    context = Context(run_id=7, node_id=0, node_config={}, state=RecordDict(), run_config=run_config)
    run(LocalGrid(2, run_config), context)  # type: ignore[arg-type]
    return tmp_path / "outputs" / "7"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_sink_of_ones_own_gets_the_configuration_every_round_and_the_end(tmp_path: Path) -> None:
    folder = start(tmp_path, " own_sinks:Lines ")
    first, *rounds, last = lines(folder / "lines.jsonl")
    assert first["config"] == json.loads((folder / "config.json").read_text())
    assert last == {"completed": True}
    assert rounds == [{"round": line["round"], **numbers(line)} for line in lines(folder / "metrics.jsonl")]
    assert rounds[1]["accuracy"] == lines(folder / "metrics.jsonl")[1]["accuracy"]


def test_a_sink_that_raises_is_left_out_and_the_run_goes_on_and_says_so(tmp_path: Path) -> None:
    folder = start(tmp_path, "own_sinks:Fails,own_sinks:Lines")
    assert json.loads((folder / "result.json").read_text())["rounds"] == 1
    (warning,) = [w for w in json.loads((folder / "result.json").read_text())["warnings"] if "telemetry" in w]
    assert warning == (
        "telemetry.sinks: 'own_sinks:Fails' is left out from round 1 on: ConnectionError('the line is dead')"
    )
    assert "the line is dead" in (folder / "report.html").read_text()


def test_a_run_that_fails_ends_its_sinks_as_failed_and_its_report_says_why(tmp_path: Path) -> None:
    """Two clients are never three."""
    with pytest.raises(SpryError, match="min-available-nodes"):
        start(tmp_path, "own_sinks:Lines", **{"server.min-available-nodes": 3, "server.wait-timeout-s": 0.1})
    folder = tmp_path / "outputs" / "7"
    assert lines(folder / "lines.jsonl")[-1] == {"completed": False}
    report = (folder / "report.html").read_text()
    assert "The run failed: 2 of 3 nodes connected" in report


@pytest.mark.parametrize(
    ("sinks", "sentence"),
    [
        ("tensorbord", "='tensorbord' is not known. Did you mean 'tensorboard'? Known: tensorboard, wandb"),
        ("own_sinks:Absent", "telemetry.sinks='own_sinks:Absent' cannot be imported"),
        ("own_sinks:cannot_begin", "'own_sinks:cannot_begin' cannot begin (PermissionError('no key'))"),
        ("own_sinks:needs", "cannot be imported here (No module named 'a_package_that_is_nowhere')"),
        ("own_sinks:nothing", "gave a int, without the methods `round` and `end`"),
    ],
)
def test_a_sink_that_cannot_be_is_refused_before_anything_is_loaded(tmp_path: Path, sinks: str, sentence: str) -> None:
    with pytest.raises(SpryError) as refused, opened(config(f"own_sinks:Lines,{sinks}"), tmp_path / "run"):
        pytest.fail("it has begun")
    assert sentence in str(refused.value)
    assert lines(tmp_path / "run" / "lines.jsonl")[-1] == {"completed": False}


@pytest.mark.parametrize(
    ("sink", "package"),
    [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow"), ("trackio", "trackio")],
)
def test_a_package_that_is_absent_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself does for "known to be absent"
    with pytest.raises(SpryError, match=rf"pip install 'spry\[{sink}\]'"), opened(config(sink), tmp_path):
        pytest.fail("it has begun")


def test_only_numbers_are_told(tmp_path: Path) -> None:
    assert numbers(LINE) == {"loss": 0.5, "asked": 4.0, "noise.cosine": 0.25}


def tell(sink: str, folder: Path) -> None:
    """Rounds 3 and 4 of a run, of which the second goes on in another process."""
    for number in (3, 4):
        with opened(config(sink), folder) as telemetry:
            assert telemetry.round(LINE | {"round": number, "loss": number / 2}) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorboard_files_hold_the_curves(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    tell("tensorboard", tmp_path)
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(3, 1.5), (4, 2.0)]
    assert [event.value for event in found.Scalars("noise.cosine")] == [0.25, 0.25]
    (written,) = {event.tensor_proto.string_val[0].decode() for event in found.Tensors("config/text_summary")}
    assert "| num-server-rounds | 5 |" in written


@pytest.mark.filterwarnings("ignore")
def test_mlflow_keeps_one_run_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tell("mlflow", tmp_path / "7")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("spry").experiment_id])
    assert (found.info.run_name, found.info.status) == ("7", "FINISHED")
    assert found.data.params["num-server-rounds"] == "5"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(3, 1.5), (4, 2.0)]


@pytest.mark.filterwarnings("ignore")
def test_trackio_keeps_one_run_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    tell("trackio", tmp_path / "7")
    (found,) = trackio.Api().runs("spry")
    assert (found.name, found.config["num-server-rounds"]) == ("7", 5)
    with closing(sqlite3.connect(tmp_path / "trackio" / "spry.db")) as kept:
        rows = kept.execute("select step, json_extract(metrics, '$.loss') from metrics order by step").fetchall()
    assert rows == [(3, 1.5), (4, 2.0)]


@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tell("wandb", tmp_path)
    kept = b"".join(path.read_bytes() for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")))
    assert b"num-server-rounds" in kept and b"loss" in kept and b"noise.cosine" in kept
