"""Every run-config key as people read it: what it may be, what it is by default, what it means. Read from the code."""

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from spry_app.config.run import RunConfig, keys

_SIGNS = {Ge: "at least {.ge}", Gt: "above {.gt}", Le: "at most {.le}", Lt: "below {.lt}"}
_KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Entry:
    """allowed: a phrase. default: as TOML has it."""

    key: str
    allowed: str
    default: str
    meaning: str


def entries() -> Iterator[Entry]:
    """In the order of the code."""
    defaults = RunConfig.defaults()
    for key, info in keys():
        meaning = " ".join(inspect.cleandoc(info.description or "").split())
        yield Entry(key, _allowed(info), json.dumps(defaults[key]), meaning)


def as_markdown() -> str:
    """A table a section."""
    lines, section = ["# Every key of a run", "", _ABOUT], None
    for entry in entries():
        head = entry.key.rpartition(".")[0]
        if head != section:
            section = head
            lines += ["", f"## {f'`{head}`' if head else 'The run'}", ""]
            lines += ["| key | default | allowed | meaning |", "|---|---|---|---|"]
        cells = (f"`{entry.key}`", f"`{entry.default}`", entry.allowed, entry.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


_ABOUT = (
    "Written by `spry keys --markdown` from `spry_app/config`; `spry keys WORD` shows those that a word is in. Set "
    "them with `spry run --run-config 'client.directions=16 head=\"split\"'`, or with `flwr run .` in the same way."
)


def _allowed(info: FieldInfo) -> str:
    if get_origin(info.annotation) is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in get_args(info.annotation))
    kinds = get_args(info.annotation) or (info.annotation,)
    bounds = [said.format(rule) for rule in info.metadata for kind, said in _SIGNS.items() if isinstance(rule, kind)]
    if any(isinstance(rule, MinLen) for rule in info.metadata):
        bounds.append("not empty")
    return ", ".join([_told(kinds), *bounds])


def _told(kinds: tuple[Any, ...]) -> str:
    """int | float is a number."""
    found = {_KINDS[kind] for kind in kinds}
    return " or ".join(sorted(found - {"whole number"} if "number" in found else found))
