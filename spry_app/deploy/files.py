"""The files of a deployment: where each lies, who may read it, none replaced unasked. Makes no keys itself."""

import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spry_app.errors import SpryError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


@dataclass(frozen=True)
class Folder:
    """One deployment's files. `root` belongs on the machine that starts runs: whoever has `ca.key` is the server."""

    root: Path

    @property
    def ca(self) -> Path:
        return self.root / "ca.crt"

    @property
    def ca_key(self) -> Path:
        return self.root / "ca.key"

    @property
    def server(self) -> Path:
        return self.root / "server.crt"

    @property
    def server_key(self) -> Path:
        return self.root / "server.key"

    @property
    def connection(self) -> Path:
        """What `flwr` reads where FLWR_HOME is this file's folder."""
        return self.root / "flwr" / "config.toml"

    def node(self, name: str, kind: str) -> Path:
        """kind: "key", "pub" (its public half) or "id" (what the SuperLink calls the node)."""
        if not _NAME.fullmatch(name):
            raise SpryError(f"The node's name is {name!r}; it must be letters, digits, - and _, e.g. jetson-1.")
        return self.root / "nodes" / f"{name}.{kind}"

    def names(self) -> list[str]:
        return sorted(path.stem for path in (self.root / "nodes").glob("*.key"))


def write(files: Mapping[Path, bytes], force: bool = False) -> None:
    """All of them or, where one exists and not `force`, none. Keys are for their owner only, as are folders made here.

    A file appears whole: it is written beside its place and moved there. Raises SpryError.
    """
    for path in files:
        if path.exists() and not force:
            raise SpryError(f"{path} exists. Nothing was written; --force replaces it.")
    try:
        for path, content in files.items():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
            if path.suffix != ".key":
                aside.chmod(0o644)
            aside.replace(path)
    except OSError as error:
        raise SpryError(
            f"{error.filename} cannot be written ({error.strerror}); --folder names another place."
        ) from None


def read(path: Path, made_by: str) -> bytes:
    """Raises SpryError, which says what command makes the file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise SpryError(f"There is no {path}: `{made_by}` makes it, or --folder names another deployment.") from None
    except OSError as error:
        raise SpryError(f"{path} cannot be read ({error.strerror}).") from None
