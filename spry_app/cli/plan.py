"""`spry plan`: what a run would take on a device, as a table or as JSON."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spry_app.cli.shared import RunConfigOption, refusals
from spry_app.errors import SpryError

if TYPE_CHECKING:
    from spry_app.planner import Plan, Row

HEAD = (
    *("gradient", "units", "at once", "weights", "activ.", "tangents/graph", "optim.", "workspace", "total MiB"),
    *("forwards", "s a step", "s a round", "up", "down", "most examples", "most tokens"),
)


def plan_command(
    run_config: RunConfigOption = None,
    memory_gib: Annotated[
        float | None,
        typer.Option(min=0.0, help="Free memory of the device for weights and training. Default: what is free here."),
    ] = None,
    forward_ms: Annotated[
        float | None,
        typer.Option(min=0.0, help="Milliseconds that the device takes for a forward pass of one example."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Devices in the run.")] = 10,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a device, where it trains in whole passes.")] = 100,
    units: Annotated[
        list[str] | None,
        typer.Option(help="Compare these alone: all, split (dealt like cards), topmost (the upper band). Repeatable."),
    ] = None,
    limits: Annotated[bool, typer.Option(help="Search for the largest batch and length.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a run would take on a device, every way to a gradient, and which to choose.

    Needs the configuration of the model, not its weights: the run's own step runs on tensors without data.
    Exit status: 0 if something fits, 1 if nothing does, 2 if there is no such run.
    """
    from spry_app.launcher.settings import run_config_of
    from spry_app.planner import Asked, plan

    errors = Console(stderr=True)
    memory = None if memory_gib is None else memory_gib * 1024
    with refusals(), errors.status("Planning") as status:
        asked = Asked(memory, forward_ms, nodes, rows, _hands(units), limits)
        found = plan(
            run_config_of({}, run_config or ()), asked, lambda step: status.update(f"Planning: {escape(step)}")
        )
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        _show(found, run_config or ())
    raise typer.Exit(0 if found.advice.row is not None else 1)


def _hands(units: list[str] | None) -> tuple[str, ...]:
    from spry_app.planner.ways import HANDS

    if unknown := sorted(set(units or ()) - HANDS.keys()):
        raise SpryError(f"--units is {unknown[0]!r}; allowed are {', '.join(HANDS)}.")
    return tuple(units or HANDS)


def _show(found: "Plan", given: Sequence[str]) -> None:
    """given: what `--run-config` said, without which the command at the end would start another run."""
    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)
    how = "measured here" if found.measured else "as given"
    speed = "speed not known" if found.forward_ms is None else f"{found.forward_ms:.2f} ms a forward pass, {how}"
    console.print(
        f"{escape(found.model)} on {found.device}: {found.memory_mib:,.0f} MiB free, {found.length} tokens an example, "
        f"{speed}. Predicted."
    )
    table = Table(*HEAD, box=None, header_style="bold")
    for index, row in enumerate(found.rows):
        style = "green" if index == found.advice.row else None if row.fits else "dim"
        table.add_row(*_cells(row), style=style)
    console.print(table)
    console.print(escape(found.advice.reason))
    if found.advice.row is not None and (keys := found.rows[found.advice.row].keys):
        said = " ".join(f"{key}={json.dumps(value)}" for key, value in keys.items())
        settings = " ".join(f"-c {shlex.quote(text)}" for text in (*given, said))
        console.print(f"spry run {escape(settings)}", soft_wrap=True)


def _cells(row: "Row") -> list[str]:
    if row.error:
        return [row.gradient, row.hand, f"not possible: {escape(row.error)}"]
    parts = (row.weights_mib, row.activations_mib, row.tangents_or_graph_mib, row.optimizer_mib, row.workspace_mib)
    sliced = f"{row.examples_at_once} ex." + (f" x {row.directions_at_once} dir." if row.directions_at_once else "")
    return [
        row.gradient,
        row.hand,
        sliced,
        *(f"{value:,.1f}" for value in parts),
        f"{row.total_mib:,.1f}" + ("" if row.fits else " too much"),
        f"{row.forwards:,.0f}",
        *("-" if value is None else f"{value:,.2f}" for value in (row.step_s, row.round_s)),
        *(f"{value / 1024:,.1f} KiB" for value in (row.up_bytes, row.down_bytes)),
        *(f"{value:,}" if value else "-" for value in (row.most_examples, row.most_tokens)),
    ]
