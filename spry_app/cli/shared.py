"""What several commands have in common: the option of settings, findings on the screen, what is refused."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from spry_app.errors import SpryError
from spry_app.findings import Finding

RunConfigOption = Annotated[
    list[str] | None,
    typer.Option(
        "--run-config",
        "-c",
        help="Settings to change, as `'key=value key2=\"text\"'` or a TOML file. Repeatable. `spry keys` shows all.",
    ),
]


def tell(findings: Iterable[tuple[str, Finding]], as_json: bool) -> int:
    """Print them as they come; 1 if there is a problem among them."""
    marks, failed = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[red]problem[/]"}, False
    console = Console(highlight=False)
    for name, found in findings:
        failed = failed or found.level == "problem"
        if as_json:
            said = {"check": name, "level": found.level, "sentence": found.sentence, **found.values}
            print(json.dumps(said), flush=True)
        else:
            console.print(f"{marks[found.level]:>16}  {escape(name)}: {escape(found.sentence)}", soft_wrap=True)
    return int(failed)


@contextmanager
def refusals(*also: type[Exception]) -> Iterator[None]:
    """Exit status 2, with its sentence, of a SpryError and of errors of these kinds."""
    refused: tuple[type[Exception], ...] = (SpryError, *also)
    try:
        yield
    except refused as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
