"""The files in deploy/: commands that the installed Flower understands, the same for systemd and containers, and no key
in an image. Whether systemd and nginx accept theirs is asked of themselves, where they are installed.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from deployed import NGINX, ROOT, UNITS, command, compose, spry, unit
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode
from typer.testing import CliRunner

from spry_app.cli import app

DEPLOY = ROOT / "deploy"
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))
IN_CONTAINERS = [
    (file.name, name) for file in sorted(DEPLOY.glob("compose.*.yaml")) for name in compose(file.name)["services"]
]


def options(words: list[str]) -> dict[str, str | None]:
    """--name value and --name=value alike; None for a flag."""
    found: dict[str, str | None] = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            found[name] = value if equals else None if following.startswith("--") else following
    return found


@pytest.mark.parametrize(
    ("program", "parser", "service", "file", "name"),
    [
        ("flower-superlink", _parse_args_run_superlink(), "spry-superlink", "compose.server.yaml", "superlink"),
        ("flower-supernode", _parse_args_run_supernode(), "spry-supernode", "compose.node.yaml", "supernode"),
    ],
)
def test_flower_knows_every_option_and_units_and_containers_give_the_same(
    program: str, parser: Any, service: str, file: str, name: str
) -> None:
    started, contained = command(f"{service}.service"), compose(file)["services"][name]["command"]
    assert (Path(started[0]).name, contained[0]) == (program, program)
    for words in (started, contained):
        parser.parse_args(words[1:])
    assert options(started).keys() == options(contained).keys()
    assert options(started)["--port"] == options(contained)["--port"]


def test_the_server_asks_for_keys_and_speaks_tls_only() -> None:
    given = options(command("spry-superlink.service"))
    assert {"--enable-supernode-auth", "--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certfile"} <= given.keys()
    assert given["--host"] == "127.0.0.1"
    assert not [path.name for path in DEPLOY.rglob("*.*") if path.suffix != ".py" and "--insecure" in path.read_text()]


def test_the_network_reaches_the_gate_and_nothing_else() -> None:
    published = compose("compose.server.yaml")["services"]["superlink"]["ports"]
    assert sorted(published) == ["127.0.0.1:8000:8000", "8443:8443"]
    gate = (DEPLOY / "gate.conf").read_text()
    assert set(re.findall(r"listen .*?(\d+) ssl;", gate)) == {"8443"}
    assert re.findall(r"location (.+) \{", gate) == ["/v1/fleet/", "= /health", "/"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_comes_back_is_bounded_and_can_change_only_its_own(name: str) -> None:
    service = unit(name)
    assert (service["Restart"], service["RestartSec"]) == ("always", "15")
    assert {"MemoryMax", "TasksMax", "TimeoutStopSec"} <= service.keys()
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == ""
    assert all(service[key] == "true" for key in ("NoNewPrivileges", "PrivateTmp", "ProtectHome", "RestrictSUIDSGID"))
    assert "StartLimitIntervalSec=0" in (UNITS / name).read_text()


@pytest.mark.parametrize(("file", "name"), IN_CONTAINERS)
def test_a_container_comes_back_is_bounded_and_can_change_only_its_own(file: str, name: str) -> None:
    service = compose(file)["services"][name]
    if "command" not in service:  # laid over another file
        assert name in compose("compose.node.yaml")["services"]
        return
    assert (service["restart"], service["read_only"], service["cap_drop"]) == ("always", True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "cpus", "pids_limit"} <= service.keys()
    assert not [
        volume for volume in service["volumes"] if not volume.startswith("state:") and not volume.endswith(":ro")
    ]


def test_every_variable_of_a_unit_is_in_its_environment_file() -> None:
    for name in SERVICES:
        used = set(re.findall(r"\$\{(\w+)\}", unit(name)["ExecStart"]))
        file = UNITS / f"{name.removeprefix('spry-').removesuffix('.service')}.env"
        given = dict(re.findall(r"^(\w+)=(.+)$", file.read_text(), re.M)) if file.exists() else {}
        assert used <= given.keys()


def test_an_image_holds_what_is_named_and_no_key() -> None:
    """Everything is left out but these; `COPY . .` brings no more."""
    everything, *named = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    kept = {line[1:] for line in named if line.startswith("!")}
    assert everything == "*"
    assert kept == {
        "constraints.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "server_app.py",
        "client_app.py",
        "spry_app",
    }
    assert "deployment" in (ROOT / ".gitignore").read_text()


def test_images_have_the_torch_that_the_makefile_installs() -> None:
    version = re.search(r"^TORCH +\?= (torch==\S+)", (ROOT / "Makefile").read_text(), re.M)
    assert version
    for name in ("Dockerfile", "Dockerfile.jetson"):
        text = (DEPLOY / name).read_text()
        assert version[1] in text
        assert re.findall(r"^USER (\w+)", text, re.M)[-1] == "spry"
    pinned = re.search(r"^bitsandbytes==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned and f"--branch {pinned[1]} " in (DEPLOY / "Dockerfile.jetson").read_text()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """With programs that exist here: it looks for them."""
    for name in SERVICES:
        text = (UNITS / name).read_text()
        (tmp_path / name).write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={shutil.which('true')}", text, flags=re.M))
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, sorted(tmp_path.iterdir()))], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not NGINX, reason="needs nginx")
def test_nginx_accepts_the_gate(tmp_path: Path) -> None:
    spry("server", "spry.local", "--folder", str(tmp_path / "etc"))
    text = (DEPLOY / "gate.conf").read_text().replace("/tmp/spry-gate", str(tmp_path / "gate"))
    (tmp_path / "etc" / "gate.conf").write_text(text)
    done = subprocess.run(
        [str(NGINX), "-t", "-c", str(tmp_path / "etc" / "gate.conf")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command_line", re.findall(r"^\$ (spry deploy [^\n|]+)", (ROOT / "docs/deployment.md").read_text(), re.M)
)
def test_every_deploy_command_of_the_guide_exists(command_line: str) -> None:
    result = CliRunner().invoke(app, [*shlex.split(command_line)[1:3], "--help"])
    assert result.exit_code == 0
    given = {word for word in shlex.split(command_line) if word.startswith("--")}
    assert given <= set(re.findall(r"--[\w-]+", result.stdout))
