"""What `flwr run` sends to the nodes: every module of the app, and nothing of the user's."""

import io
import shutil
import zipfile
from pathlib import Path

from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).parent.parent


def test_the_bundle_holds_every_module_and_no_data(tmp_path: Path) -> None:
    """Flower drops files by name (`*_test.py`, `lib/`), which shows only when a node imports them."""
    for name in ("pyproject.toml", ".gitignore", "server_app.py", "client_app.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "spry_app", tmp_path / "spry_app")
    for private in ("mine.jsonl", "outputs/1/result.json", "data/patients.json"):
        (tmp_path / private).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / private).write_text("{}")
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tmp_path))) as bundle:
        bundled = set(bundle.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "spry_app").rglob("*.py")}
    assert bundled == modules | {"server_app.py", "client_app.py", "pyproject.toml", ".info/CONTENT"}
