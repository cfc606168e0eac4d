"""What `flwr run` sends to the nodes: every module of the app, and nothing of the user's."""

import io
import shutil
import zipfile
from pathlib import Path

from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).parent.parent
ENTRIES = {"server_app.py", "client_app.py"}


def bundled(folder: Path) -> set[str]:
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))) as bundle:
        return set(bundle.namelist())


def test_the_bundle_holds_every_module_of_the_app_one_of_the_users_and_nothing_else(tmp_path: Path) -> None:
    """Of a whole checkout. Flower drops files by name (`*_test.py`, `lib/`), which shows when a node imports them."""
    for room in ("spry_app", "docs", "tests", "benchmarks", "deploy"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and (path.suffix != ".py" or path.name in ENTRIES):
            shutil.copy(path, tmp_path)
    for private in ("mine.jsonl", "mine.toml", "notes.md", "outputs/1/result.json", "data/patients.json"):
        (tmp_path / private).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / private).write_text("{}")
    (tmp_path / "my_method.py").write_text("")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "spry_app").rglob("*.py")}
    assert bundled(tmp_path) == modules | ENTRIES | {"my_method.py", "pyproject.toml", ".info/CONTENT"}
