"""Rows of tables by their names, and objects that users bring, by "package.module:object". What they must be is for
their room to say.
"""

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from spry_app.errors import SpryError


def load_object(path: str, key: str) -> Any:
    """Import "package.module:object"; `key` is the run-config key it came from."""
    module, _, attribute = path.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SpryError(f'{key}={path!r} cannot be imported ({error}). It must be "package.module:object".') from error


def look_up(name: str, table: Mapping[str, Any], key: str) -> Any:
    """The row of this name, or the object at "package.module:object"; `key` is the run-config key it came from. Raises
    SpryError.
    """
    if ":" in name:
        return load_object(name, key)
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SpryError(f'{key}={name!r} is not known.{hint} Known: {", ".join(table)}, or "package.module:object".')
    return table[name]
