"""From the command line to what Flower is given: run config and federation config, checked before anything starts."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from flwr.common.config import flatten_dict, get_project_config, parse_config_args
from flwr.supercore.utils import simulation_config_from_json

from spry_app.config import RunConfig, Scalar
from spry_app.config.peft_keys import adapter_keys
from spry_app.errors import SpryError
from spry_app.launcher.processes import usable_cores

_LOCAL: dict[str, Callable[[Path], bool]] = {
    "data.source": Path.is_file,
    "data.test": Path.is_file,
    "model.name": Path.is_dir,
    "adapter.path": Path.is_dir,
}
"""Keys that may hold a path, and what is one; anything else is a name (on the Hub, or one of ours)."""
LAUNCH = "launch.json"
"""In the folder of a run: what its config does not tell."""
_SETTING = re.compile(r"\S+?=('[^']*'|\"[^\"]*\"|\S+)")
"""One setting on the command line, as flwr.common.config finds it."""


@dataclass(frozen=True)
class Simulation:
    """What was asked for on the command line."""

    app: Path
    nodes: int
    run_config: Sequence[str] = ()
    federation_config: Sequence[str] = ()
    gpus_per_client: float = 0.0
    output_dir: Path | None = None
    resume: Path | None = None
    verbose: bool = False


def run_config(simulation: Simulation) -> dict[str, Scalar]:
    """The keys to override, checked together with pyproject.toml's, with every local path absolute.

    Paths have to be: the server's working directory is an empty one, where no app's modules shadow another's. Nor can
    the server know which keys were set to their defaults, so a preset that would take them is resolved here.
    """
    try:
        defaults = flatten_dict(get_project_config(simulation.app)["tool"]["flwr"]["app"].get("config", {}))
    except (FileNotFoundError, ValueError) as error:
        raise SpryError(f"No Flower app in {simulation.app}: {error}") from None
    overrides = _resumed(simulation.resume) | _parse("--run-config", simulation.run_config)
    overrides = chosen = _given(overrides) | overrides
    config = RunConfig.from_flower(defaults | chosen, chosen.keys())
    if config != RunConfig.from_flower(defaults | chosen):
        overrides = config.flat() | {"preset": ""}
    if simulation.nodes < config.server.min_available_nodes:
        raise SpryError(
            f"--nodes is {simulation.nodes}, and server.min-available-nodes is {config.server.min_available_nodes}: "
            "the run would wait for devices that never come. Raise the one or lower the other."
        )
    for key, is_local in _LOCAL.items():
        path = Path(str(chosen.get(key, ""))).expanduser()
        if key in chosen and is_local(path):
            overrides[key] = str(path.resolve())
    overrides["output-dir"] = str((simulation.output_dir or Path(config.output_dir)).expanduser().resolve())
    return overrides


def run_config_of(base: Mapping[str, Scalar], given: Sequence[str]) -> RunConfig:
    """What `--run-config` says, over `base` and the defaults of the program."""
    chosen = {**base, **_parse("--run-config", given)}
    return RunConfig.from_flower(RunConfig.defaults() | chosen, chosen.keys())


def resumed_nodes(folder: Path) -> int:
    """How many devices the run in `folder` had. Raises SpryError where it was not started by `spry run`."""
    return int(_json(folder / LAUNCH)["nodes"])


def keep_launch(simulation: Simulation, folder: Path) -> None:
    """What `resumed_nodes` reads again."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LAUNCH).write_text(json.dumps({"nodes": simulation.nodes}) + "\n")


def _resumed(folder: Path | None) -> dict[str, Scalar]:
    """Every key of the run in `folder`, and the one that says to go on with it; nothing for a run that begins."""
    if folder is None:
        return {}
    return _json(folder / "config.json") | {"resume": str(folder.expanduser().resolve())}


def _given(overrides: dict[str, Scalar]) -> dict[str, Scalar]:
    """Keys of the adapter that a run is to start from; nothing where its folder cannot be read, as the server says."""
    file = Path(str(overrides.get("adapter.path", "")), "adapter_config.json").expanduser()
    try:
        return adapter_keys(json.loads(file.read_text())) if overrides.get("adapter.path") else {}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SpryError(f"--resume {path.parent}: this is not the folder of a run of `spry run` ({error}).") from None
    return found


def federation_config(simulation: Simulation) -> dict[str, Scalar]:
    """Flower's simulation settings: as many clients at once as there are cores, never more than there are nodes.

    Ray sets OMP_NUM_THREADS of a client to the CPUs it is given; the server process, idle meanwhile, keeps them all.
    """
    cores = usable_cores()
    at_once = min(simulation.nodes, cores)
    ours: dict[str, Scalar] = {
        "num-supernodes": simulation.nodes,
        "client-resources-num-cpus": cores // at_once,
        "client-resources-num-gpus": float(simulation.gpus_per_client),
        "init-args-num-cpus": cores // at_once * at_once,
    }
    merged = ours | _parse("--federation-config", simulation.federation_config)
    try:
        simulation_config_from_json({key.replace("-", "_"): value for key, value in merged.items()})
    except (TypeError, ValueError) as error:
        raise SpryError(f"--federation-config: {error}") from None
    return merged


def _parse(option: str, given: Sequence[str]) -> dict[str, Scalar]:
    """As Flower reads each; later ones win. Of several at once it drops keys (of `data.` all but the last one's), as it
    drops what it cannot read, such as a key without its value.
    """
    if unread := " ".join(_SETTING.sub("", text).strip() for text in given if not text.endswith(".toml")).strip():
        raise SpryError(f"{option} {' '.join(given)!r}: cannot read {unread!r}. Write 'key=value key2=\"some text\"'.")
    try:
        return {key: value for text in given for key, value in parse_config_args([text]).items()}
    except click.ClickException as error:
        raise SpryError(f"{option} {' '.join(given)!r}: {error.format_message()}") from None
    except (OSError, ValueError) as error:
        raise SpryError(f"{option} {' '.join(given)!r}: {error}") from None
