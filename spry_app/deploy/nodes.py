"""Nodes of a deployment: a key for each, and the SuperLink's list of those it lets in. Certificates are elsewhere."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from spry_app.deploy.files import Folder, read, write
from spry_app.errors import SpryError
from spry_app.launcher.processes import Processes
from spry_app.launcher.superlink import answer_of, environment, reason_of

_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Registered:
    """A node as the SuperLink knows it. name: that of its key here, "" if it was registered from elsewhere."""

    name: str
    node_id: str
    status: str


def make_key(folder: Folder, name: str, force: bool) -> Path:
    """An ECDSA key on P-384, as `ssh-keygen -t ecdsa -b 384 -N ''` makes it: the form that Flower reads.

    A key that is registered is not replaced, not even by `force`: the SuperLink would go on trusting the old one.
    """
    if folder.node(name, "id").exists():
        raise SpryError(f"{name} is registered with its key: first `spry deploy remove {name}`.")
    key = ec.generate_private_key(ec.SECP384R1())
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write({folder.node(name, "key"): secret, folder.node(name, "pub"): public + f" {name}\n".encode()}, force)
    return folder.node(name, "key")


def write_connection(folder: Folder, superlink: str) -> None:
    """Make a FLWR_HOME for `flwr`; superlink: host:port where runs are started and nodes listed."""
    address, certificate = json.dumps(superlink), json.dumps(str(folder.ca.resolve()))
    content = (
        f'[superlink]\ndefault = "spry"\n\n[superlink.spry]\naddress = {address}\nroot-certificates = {certificate}\n'
    )
    write({folder.connection: content.encode()}, force=True)


def register(folder: Folder, name: str) -> str:
    """Let the node in; its id at the SuperLink. Raises SpryError, e.g. where it is in already."""
    read(folder.node(name, "pub"), f"spry deploy node {name}")
    answer = _flwr(folder, "register", str(folder.node(name, "pub").resolve()), "--name", name)
    node_id = str(answer["node-id"])
    write({folder.node(name, "id"): f"{node_id}\n".encode()}, force=True)
    return node_id


def registered(folder: Folder) -> list[Registered]:
    """Those that are let in; Flower lists the removed ones too."""
    names = {_id(folder, name): name for name in folder.names()}
    listed = _flwr(folder, "list")["nodes"]
    return [
        Registered(names.get(str(node["node-id"]), ""), str(node["node-id"]), node["status"])
        for node in listed
        if node["status"] != "unregistered"
    ]


def remove(folder: Folder, name: str) -> str:
    """Never let that key in again, from now on; its files here go too. `name`: of a key here, or a node's id."""
    node_id = name if name.isdecimal() else _id(folder, name)
    if not node_id:
        raise SpryError(f"{name} is not registered from {folder.root}; `spry deploy list` has every node's id.")
    _flwr(folder, "unregister", node_id)
    if not name.isdecimal():
        for kind in ("key", "pub", "id"):
            folder.node(name, kind).unlink(missing_ok=True)
    return node_id


def _id(folder: Folder, name: str) -> str:
    path = folder.node(name, "id")
    return path.read_text().strip() if path.exists() else ""


def _flwr(folder: Folder, *arguments: str) -> dict[str, Any]:
    """What `flwr supernode` answers; raises SpryError with its reason."""
    read(folder.connection, "spry deploy server")
    processes = Processes(environment(folder.root.resolve()), folder.root)
    try:
        answer = answer_of(processes.call(["flwr", "supernode", *arguments, "--format", "json"], _PATIENCE_S))
    except subprocess.TimeoutExpired:
        raise SpryError(f"The SuperLink of {folder.connection} did not answer within {_PATIENCE_S:.0f} s.") from None
    if not answer.get("success"):
        raise SpryError(f"The SuperLink of {folder.connection} says no: {reason_of(answer)}")
    return answer
