"""`spry data`: looks at rows before a run does."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from spry_app.cli.shared import RunConfigOption, refusals, tell

data = typer.Typer(no_args_is_help=True, help="Look at rows before a run does.")


@data.command("check")
def data_check_command(
    file: Annotated[Path, typer.Argument(help="A node's own rows: .jsonl, .json, .csv or .parquet.")],
    run_config: RunConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line and finding.")] = False,
) -> None:
    """Say what is wrong with a file of rows, and in which lines.

    Its classes are those that the settings name (data.label-names, data.num-labels, data.source), else its own.
    Exit status: 0 if it can be trained on, 1 if not, 2 if it could not be looked at.
    """
    from datasets import disable_progress_bars
    from datasets.utils.logging import CRITICAL, set_verbosity

    from spry_app.data.check import check_file
    from spry_app.launcher.settings import run_config_of

    with refusals():
        disable_progress_bars()
        set_verbosity(CRITICAL)  # what it says of a file that it cannot read is in the finding
        config = run_config_of({"data.source": str(file)}, run_config or ())
        raise typer.Exit(tell(check_file(str(file), config.data), as_json))


@data.command("shards")
def data_shards_command(
    nodes: Annotated[int, typer.Option(min=1, help="Number of virtual devices.")] = 10,
    run_config: RunConfigOption = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it into this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Show which labels each device of a simulation would hold.

    Exit status: 0, or 2 if the rows cannot be dealt out so.
    """
    from spry_app.data.portrait import dealt, draw
    from spry_app.launcher.settings import run_config_of

    with refusals():
        config = run_config_of({}, run_config or ())
        names, rows = dealt(config.data, config.seed, nodes)
        if picture:
            draw(names, rows, picture)
    table = Table("device", "rows", *names, box=None)
    for index, row in enumerate(rows):
        table.add_row(str(index), str(sum(row)), *map(str, row))
    Console(width=None if sys.stdout.isatty() else 1000).print(table)
