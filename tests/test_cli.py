"""The `spry` command refuses what it cannot run before it starts anything, and says which key to change."""

import json
import tomllib
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from spry_app.cli import app
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.launcher.settings import (
    Simulation,
    federation_config,
    keep_launch,
    resumed_nodes,
    run_config,
    run_config_of,
)

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--run-config", "client.learning_rate=0.1"], "Did you mean 'client.learning-rate'?"),
        (["--run-config", "client.directions=0"], "greater than or equal to 1"),
        (["--run-config", "seed=1", "--run-config", "seed"], "cannot read 'seed'"),
        (["--run-config", "seed = 1"], "cannot read 'seed = 1'"),
        (["--run-config", "data.source=mine"], "invalid format"),
        (["--run-config", "missing.toml"], "No such file"),
        (["--federation-config", "num-supernode=3"], "num_supernode"),
        (["--federation-config", 'num-supernodes="three"'], "--federation-config"),
        (["--nodes", "1"], "server.min-available-nodes is 2"),
        (["--nodes", "0"], "--nodes"),
        (["--resume", "/no/such/run"], "--resume /no/such/run: this is not the folder of a run of `spry run`"),
    ],
)
def test_bad_input_is_refused_with_2_before_anything_starts(arguments: list[str], sentence: str) -> None:
    before = psutil.Process().children(recursive=True)
    result = CliRunner().invoke(app, ["run", str(ROOT), *arguments])
    assert result.exit_code == 2, result.output
    assert sentence in " ".join(result.output.split())
    assert psutil.Process().children(recursive=True) == before


def test_a_folder_without_an_app_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(tmp_path)])
    assert result.exit_code == 2
    assert "Cannot find pyproject.toml" in result.output


def test_settings_come_from_a_file_as_from_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('seed = 3\n[client]\nlearning-rate = 0.5\n[data]\ntext-field = "a b"\n')
    from_file = run_config(Simulation(ROOT, 10, [str(path)]))
    from_line = run_config(Simulation(ROOT, 10, ["seed=3 client.learning-rate=0.5", "data.text-field='a b'"]))
    assert from_file == from_line
    assert from_line["data.text-field"] == "a b"


def test_of_several_files_and_lines_every_key_counts_and_the_last_wins(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('seed = 3\n[data]\npartition = "iid"\nalpha = 0.5\n')
    found = run_config(Simulation(ROOT, 10, [str(path), "data.max-length=9 data.alpha=2.0", 'data.text-field="x"']))
    assert {key: found[key] for key in found if key.startswith("data.")} == {
        "data.partition": "iid",
        "data.alpha": 2.0,
        "data.max-length": 9,
        "data.text-field": "x",
    }
    assert found["seed"] == 3


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("", {"adapter.subspace": "core", "server.learning-rate": 0.072}),
        ("seed=3", {"adapter.subspace": "core", "server.learning-rate": 0.072}),
        ('adapter.kind="lora"', {"adapter.subspace": "none", "assign": "", "server.learning-rate": 0.008}),
        ("server.learning-rate=0.008", {"adapter.subspace": "core", "server.learning-rate": 0.008}),
        ('preset="spry-paper" adapter.dropout=0.0', {"adapter.dropout": 0.0, "server.tau": 1e-3}),
    ],
)
def test_a_key_that_is_set_to_its_default_is_set(given: str, found: dict[str, Any]) -> None:
    """On every machine: what Flower hands over there is the defaults of the app and these."""
    settings = run_config(Simulation(ROOT, 10, [given] if given else []))
    there = RunConfig.from_flower(RunConfig.defaults() | settings).flat()
    assert found.items() <= there.items()
    planned = run_config_of({}, [given] if given else []).flat()
    assert {key for key in there if there[key] != planned[key]} <= {"preset", "output-dir"}


def test_a_run_is_resumed_with_its_own_settings_and_devices(tmp_path: Path) -> None:
    keep_launch(Simulation(ROOT, 7), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RunConfig.from_flower({"seed": 3}).flat()))
    assert resumed_nodes(tmp_path) == 7
    settings = run_config(Simulation(ROOT, 7, ["num-server-rounds=80"], resume=tmp_path))
    assert (settings["seed"], settings["num-server-rounds"], settings["resume"]) == (3, 80, str(tmp_path))


def test_local_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server works in an empty directory, where a relative path means nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").touch()
    (tmp_path / "bert").mkdir()
    names = 'data.source="rows.csv" data.test="test" model.name="bert"'
    assert run_config(Simulation(ROOT, 10, [names])) == {
        "data.source": str(tmp_path / "rows.csv"),
        "data.test": "test",
        "model.name": str(tmp_path / "bert"),
        "output-dir": str(tmp_path / "outputs"),
    }
    assert run_config(Simulation(ROOT, 10, output_dir=Path("elsewhere")))["output-dir"] == str(tmp_path / "elsewhere")


def test_no_more_clients_work_at_once_than_there_are_nodes_or_cores() -> None:
    for nodes in (1, 2, 1000):
        config = federation_config(Simulation(ROOT, nodes))
        assert config["num-supernodes"] == nodes
        at_once = config["init-args-num-cpus"] // config["client-resources-num-cpus"]
        assert 1 <= at_once <= nodes
        assert config["init-args-num-cpus"] <= psutil.cpu_count()


def test_a_given_federation_config_wins() -> None:
    config = federation_config(Simulation(ROOT, 10, federation_config=["client-resources-num-cpus=3"]))
    assert config["client-resources-num-cpus"] == 3
    with pytest.raises(SpryError, match="num_cores"):
        federation_config(Simulation(ROOT, 10, federation_config=["num-cores=3"]))


def test_the_version_is_pyprojects() -> None:
    try:
        installed_version("spry")
    except PackageNotFoundError:
        pytest.skip("spry is not installed: pip install -e .")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert CliRunner().invoke(app, ["--version"]).output == f"spry {version}\n"


def test_help_lists_the_options() -> None:
    for arguments in (["--help"], ["run", "--help"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert "--run-config" in result.output
