"""The commands of `spry deploy`: read arguments, call, say what to do next. No key is ever printed."""

from pathlib import Path
from typing import Annotated

import typer

from spry_app.cli.shared import refusals

deploy = typer.Typer(
    no_args_is_help=True,
    help="Certificates, keys and the list of nodes of a deployment on real devices: docs/deployment.md.",
)
_FolderOption = Annotated[Path, typer.Option("--folder", "-d", help="Where the deployment's files are.")]
_FOLDER = Path("deployment")
_Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
_Name = Annotated[str, typer.Argument(help="Name of the node, e.g. jetson.")]
NODE_PORT = 8443


@deploy.command("server")
def server_command(
    names: Annotated[list[str], typer.Argument(help="Names and addresses by which nodes reach the server.")],
    days: Annotated[int, typer.Option(min=1, help="How long the server's certificate is valid.")] = 397,
    superlink: Annotated[
        str, typer.Option(help="host:port of the SuperLink for you: where runs are started.")
    ] = "127.0.0.1:8000",
    folder: _FolderOption = _FOLDER,
    force: _Force = False,
) -> None:
    """Make the server's certificate, and the CA that signs it if there is none."""
    from spry_app.deploy.certificates import make_server, valid_until
    from spry_app.deploy.files import Folder
    from spry_app.deploy.nodes import write_connection

    files = Folder(folder)
    with refusals():
        made = make_server(files, names, days, force)
        write_connection(files, superlink)
        print(f"{'New CA' if made else 'CA as before'}: {files.ca} (its key stays here: {files.ca_key.name})")
        print(f"Server certificate, valid until {valid_until(files)}: {files.server}, {files.server_key.name}")
        print(f"For the server: {files.ca.name}, {files.server.name}, {files.server_key.name}")
        print(f"To start runs:  export FLWR_HOME={files.connection.parent.resolve()}")


@deploy.command("renew")
def renew_command(
    days: Annotated[int, typer.Option(min=1, help="How long the new certificate is valid.")] = 397,
    folder: _FolderOption = _FOLDER,
) -> None:
    """Make the server's certificate anew, for the same names; the nodes need nothing."""
    from spry_app.deploy.certificates import make_server, server_names, valid_until
    from spry_app.deploy.files import Folder

    files = Folder(folder)
    with refusals():
        make_server(files, server_names(files), days, force=True)
        print(f"Valid until {valid_until(files)}: copy {files.server} and {files.server_key.name}, restart the server.")


@deploy.command("node")
def node_command(
    name: _Name,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where the server lets nodes in.")] = NODE_PORT,
    folder: _FolderOption = _FOLDER,
    force: _Force = False,
) -> None:
    """Make a node's key, and say which two files and which line its box needs."""
    from spry_app.deploy.certificates import server_names
    from spry_app.deploy.files import Folder
    from spry_app.deploy.nodes import make_key

    files = Folder(folder)
    with refusals():
        host = server_names(files)[0]
        key = make_key(files, name, force)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"1. Here:            spry deploy register {name}{'' if folder == _FOLDER else f' --folder {folder}'}")
        print(f"2. Copy to the box: {files.ca} {key}")
        print("3. On the box, one line:")
        print(
            f"FLWR_TELEMETRY_ENABLED=0 flower-supernode --superlink {address} --root-certificates {files.ca.name} "
            f"--auth-supernode-private-key {key.name} --node-config 'data=\"/path/to/its/own.jsonl\"'"
        )


@deploy.command("register")
def register_command(name: _Name, folder: _FolderOption = _FOLDER) -> None:
    """Tell the running SuperLink to let the node in."""
    from spry_app.deploy.files import Folder
    from spry_app.deploy.nodes import register

    with refusals():
        print(f"{name} is node {register(Folder(folder), name)}")


@deploy.command("list")
def list_command(folder: _FolderOption = _FOLDER) -> None:
    """List the nodes that the running SuperLink lets in."""
    from spry_app.deploy.files import Folder
    from spry_app.deploy.nodes import registered

    with refusals():
        for node in registered(Folder(folder)):
            print(f"{node.name or '(registered elsewhere)':24} {node.node_id:>20}  {node.status}")


@deploy.command("remove")
def remove_command(
    name: Annotated[str, typer.Argument(help="Name of the node, or its id.")], folder: _FolderOption = _FOLDER
) -> None:
    """Tell the running SuperLink to let the node in no more, and delete its key here."""
    from spry_app.deploy.files import Folder
    from spry_app.deploy.nodes import remove

    with refusals():
        print(f"Removed node {remove(Folder(folder), name)}; its key is of no use any more.")
