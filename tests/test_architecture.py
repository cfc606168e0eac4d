"""Imports follow the arrows: a room imports only the rooms listed for it, so the drawing in the README cannot rot."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "spry_app"
LEAVES = {"atomic", "config", "errors", "findings", "offline"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "atomic": set(),
    "findings": set(),
    "config": {"errors"},
    "autodiff": set(),
    "slope_log": {"atomic", "errors"},
    "plugins": {"errors"},
    "stored": {"errors"},
    "offline": set(),
    "protocol": {"errors", "slope_log"},
    "privacy": {"errors", "autodiff"},
    "optimizers": {"autodiff", "errors"},
    "tasks": LEAVES | {"autodiff", "plugins", "stored"},
    "models": LEAVES | {"autodiff", "stored", "tasks"},
    "data": LEAVES | {"stored", "tasks"},
    "methods": LEAVES | {"autodiff", "optimizers", "plugins", "slope_log"},
    "objectives": {"errors", "autodiff", "models", "prefix", "protocol", "tasks"},
    "prefix": {"models", "tasks"},
    "client": LEAVES
    | {"autodiff", "data", "methods", "models", "objectives", "optimizers", "prefix", "privacy", "protocol", "tasks"},
    "report": LEAVES,
    "server": LEAVES
    | {"autodiff", "data", "methods", "models", "objectives", "optimizers", "prefix", "privacy", "protocol"}
    | {"plugins", "report", "slope_log", "tasks"},
    "worker": LEAVES | {"autodiff", "client"},
    "launcher": LEAVES | {"report"},
    "deploy": LEAVES | {"launcher"},
    "doctor": LEAVES | {"autodiff", "client", "methods", "models"},
    "planner": LEAVES
    | {"autodiff", "client", "data", "methods", "models", "objectives", "protocol", "server", "slope_log", "tasks"},
    "cli": LEAVES | {"data", "deploy", "doctor", "launcher", "models", "planner", "report", "server", "worker"},
}
MAY_IMPORT_FLOWER = {"protocol", "client", "server", "launcher", "data", "worker"}
FORBIDDEN_NAMES = {"utils", "common", "helpers", "core", "misc"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "spry_app":
            yield from (f"spry_app.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.name != "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("spry_app.")}
    assert rooms - {room(path)} <= ALLOWED[room(path)]


def test_only_the_shell_knows_flower() -> None:
    knows = {room(path) for path in FILES if any(name.split(".")[0] == "flwr" for name in imports(path))}
    assert knows <= MAY_IMPORT_FLOWER


def test_only_the_command_line_reads_arguments_and_ends_the_process() -> None:
    assert {room(path) for path in FILES if any(name.split(".")[0] == "typer" for name in imports(path))} == {"cli"}


def test_the_numerical_core_needs_neither_flower_nor_transformers() -> None:
    roots = {name.split(".")[0] for path in FILES if room(path) == "autodiff" for name in imports(path)}
    assert not roots & {"flwr", "transformers", "peft", "pydantic", "bitsandbytes"}


def test_no_file_is_a_second_room_in_hiding() -> None:
    assert not {path.stem for path in FILES} & FORBIDDEN_NAMES
    assert not [str(path) for path in FILES if len(path.read_text().splitlines()) > 300]


def test_the_library_never_touches_the_global_seed() -> None:
    assert not [str(path) for path in FILES if "torch.manual_seed" in path.read_text()]
