"""The commands but those of `deploy` and `data`: arguments, and whom to call."""

import json
import logging
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from spry_app.atomic import write_whole
from spry_app.cli.data import data
from spry_app.cli.deploy import deploy
from spry_app.cli.plan import plan_command
from spry_app.cli.shared import RunConfigOption, refusals, tell
from spry_app.errors import SpryError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_show_locals=False
)
app.add_typer(deploy, name="deploy")
app.add_typer(data, name="data")
app.command("plan")(plan_command)


@app.callback(invoke_without_command=True)
def _spry(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Fine-tune language models across devices by forward gradients."""
    if version:
        print(f"spry {installed_version('spry')}")
        raise typer.Exit


@app.command("run")
def run_command(
    app_dir: Annotated[Path, typer.Argument(help="Folder of the Flower app, with its pyproject.toml.")] = Path("."),
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Number of virtual devices: 10, or with --resume as many as there were."),
    ] = None,
    run_config: RunConfigOption = None,
    federation_config: Annotated[
        list[str] | None,
        typer.Option("--federation-config", help="Settings of Flower's simulation; they win over the ones made here."),
    ] = None,
    gpus_per_client: Annotated[
        float, typer.Option(min=0.0, help="Share of a GPU that a device takes; 0.25 lets four use one at once.")
    ] = 0.0,
    output_dir: Annotated[
        Path | None, typer.Option(help="Where a folder for the run is made; overrides the key output-dir.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a run that ended early, or that is to have more rounds (-c num-server-rounds=80): "
            "goes on after its last round, with its settings, and writes into the same folder."
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log of the run as well.")] = False,
) -> None:
    """Run the app on virtual devices on this machine and follow it to its end.

    Starts a Flower SuperLink of its own and stops it again, whatever happens. Exit status: 0 if the run completed,
    1 if it failed, 2 if it could not be started as asked, 130 after Ctrl-C.
    """
    from spry_app.launcher.settings import Simulation, resumed_nodes
    from spry_app.launcher.simulation import run

    with refusals():
        simulation = Simulation(
            app=app_dir,
            nodes=nodes or (resumed_nodes(resume) if resume else 10),
            run_config=run_config or (),
            federation_config=federation_config or (),
            gpus_per_client=gpus_per_client,
            output_dir=output_dir,
            resume=resume,
            verbose=verbose,
        )
        raise typer.Exit(run(simulation, Console()))


@app.command("rebuild")
def rebuild_command(
    log: Annotated[Path, typer.Argument(help="slopes.jsonl of a run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the adapter into.")] = Path("adapter"),
    model: Annotated[str, typer.Option(help="Local copy of the base model, in place of the run's model.name.")] = "",
) -> None:
    """Rebuild a run's adapter from the scalars its clients sent.

    Exit status: 0 if the result is, to the bit, what the server had, else 2.
    """
    from spry_app.server.rebuild import rebuild

    with refusals():
        round_ = rebuild(log, output, model)
    print(f"The adapter after round {round_} is in {output}")


@app.command("keys")
def keys_command(
    word: Annotated[str, typer.Argument(help="Show the keys that have this in their name, values or meaning.")] = "",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="All of them, as docs/configuration.md has them.")
    ] = False,
) -> None:
    """Show every key of a run: default, what it may be, what it means.

    Exit status: 0, or 1 if there is none with that word.
    """
    from spry_app.config.reference import as_markdown, entries

    if markdown:
        print(as_markdown(), end="")
        return
    console = Console(highlight=False)
    found = [entry for entry in entries() if word.lower() in f"{entry.key} {entry.allowed} {entry.meaning}".lower()]
    for entry in found:
        console.print(f"[bold]{escape(entry.key)}[/] = {escape(entry.default)}  [dim]{escape(entry.allowed)}[/]")
        if entry.meaning:
            console.print(Padding(escape(entry.meaning), (0, 0, 0, 4)))
    if not found:
        print(f"No key has {word!r} in its name, values or meaning.", file=sys.stderr)
        raise typer.Exit(1)


@app.command("report")
def report_command(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs: outputs/<run id>. Several are compared.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write: report.html in the run's folder, or here.")
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(help="Of the comparison: what it took each run to get there. Default: what all of them reach."),
    ] = None,
) -> None:
    """Write a run down as one HTML file, or several runs side by side; also while they are running.

    Exit status: 0, or 2 where a folder is not one of a run.
    """
    from spry_app.report import REPORT, render

    path = out or Path(folders[0] if len(folders) == 1 else ".", REPORT)
    with refusals(OSError):
        write_whole(path, render(folders, target))
    print(path)


@app.command("export")
def export_command(
    source: Annotated[Path, typer.Argument(help="Folder of a run, or of an adapter.")],
    output: Annotated[Path, typer.Argument(help="Folder to write the model into: absent or empty.")],
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    model: Annotated[str, typer.Option(help="Local copy of the base model, in place of the one that is named.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace all that is in OUTPUT.")] = False,
) -> None:
    """Merge an adapter into its base model, for transformers alone. Pushes nowhere.

    Exit status: 0, or 2 where it cannot be merged or OUTPUT is not empty.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would tell of kernels that no merge needs
    from spry_app.server.export import DTYPES, export

    with refusals():
        if dtype not in DTYPES:
            raise SpryError(f"--dtype is {dtype!r}; allowed are {', '.join(DTYPES)}.")
        loaded = export(source, output, dtype, model, force)
    print(f"The model is in {output}: {loaded}")


@app.command("mean-pool")
def mean_pool_command(
    model: Annotated[str, typer.Argument(help="As model.name: a sentence encoder of the families BERT and RoBERTa.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write into: absent or empty. Then model.name.")],
    revision: Annotated[str, typer.Option(help="As model.revision.")] = "",
) -> None:
    """Give a sentence encoder (all-MiniLM, E5, GTE) one more block, so that its classifier sees the mean of all tokens.

    What is written is a plain checkpoint, for other programs: `spry run` does so by itself (model.pooling).
    Exit status: 0, or 2 where that cannot be done.
    """
    from spry_app.models.checkpoint import mean_pool

    with refusals():
        mean_pool(model, folder, revision)
    print(f"Train it with --run-config 'model.name=\"{folder}\"'")


@app.command("doctor")
def doctor_command(
    device: Annotated[str, typer.Option(help="As model.device of a run.")] = "auto",
    quantization: Annotated[
        str, typer.Option(help="As model.quantization of a run: it must work here. Others are tried, and may fail.")
    ] = "none",
    superlink: Annotated[str, typer.Option(help="host:port of a SuperLink that this box is to join.")] = "",
    root_certificates: Annotated[
        Path | None, typer.Option(help="The CA's certificate, as of `flower-supernode`; else those of the system.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="The SuperLink speaks without TLS.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line and check.")] = False,
) -> None:
    """Say what this box can do, and what it will choose.

    Exit status: 0 if it can train (and reach the SuperLink), else 1.
    """
    from spry_app.doctor import QUANTIZATIONS, examine

    if quantization not in QUANTIZATIONS:
        print(f"--quantization is {quantization!r}; allowed are {', '.join(QUANTIZATIONS)}.", file=sys.stderr)
        raise typer.Exit(2)
    raise typer.Exit(tell(examine(device, quantization, superlink, root_certificates, insecure), as_json))


@app.command("worker")
def worker_command(
    socket: Annotated[
        Path | None,
        typer.Option(
            help="Unix socket, in a folder of mode 0700; `worker` in the node config. Default: $FLWR_HOME/spry."
        ),
    ] = None,
    idle_s: Annotated[float, typer.Option(min=0.0, help="Seconds without a message after which to end; 0: never.")] = 0,
    status: Annotated[bool, typer.Option("--status", help="Print how the worker is, as JSON, and exit.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End the worker and exit.")] = False,
    code: Annotated[str, typer.Option(hidden=True)] = "",
    descriptors: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Keep this node's model warm: one process that answers a SuperNode's messages.

    Without it, the first message starts one. Exit status: 0 after --idle-s or SIGTERM, 75 where another one lives here;
    with --status and --stop 1 where there is none.
    """
    from spry_app.worker.ask import health
    from spry_app.worker.life import live
    from spry_app.worker.place import Place, default_place

    place = Place(socket.expanduser().absolute()) if socket else default_place()
    with refusals():
        if not (status or stop):
            raise typer.Exit(live(place, idle_s, code, descriptors))
        found = health(place) if status else place.stop()
    if not found:
        print(f"No worker at {place.socket}", file=sys.stderr)
    elif status:
        print(json.dumps(found))
    raise typer.Exit(0 if found else 1)
