"""Objects that users bring, by "package.module:object". What they must be is for their room to say."""

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
