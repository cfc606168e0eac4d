"""`spry doctor` tells the truth about this box: each fault that it is to find is made, and found."""

import contextlib
import datetime
import ipaddress
import json
import os
import re
import shutil
import socket
import ssl
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from http.client import HTTPException, HTTPSConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from spry_app.cli import app
from spry_app.doctor import connection, examine, machine
from spry_app.doctor.training import training
from spry_app.launcher.processes import Processes
from spry_app.launcher.superlink import environment, free_port


def test_this_box_is_well_and_says_so_for_people_and_for_scripts() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json", "--quantization", "nf4"])
    found = {line["check"]: line for line in map(json.loads, result.stdout.splitlines())}
    assert result.exit_code == 0, result.stdout
    assert list(found) == [
        "software",
        "accelerator",
        "attention",
        "memory",
        "disk",
        "clock",
        "forward mode",
        "weights in nf4",
        "weights in fp4",
        "weights in int8",
    ]
    assert found["weights in nf4"]["level"] == found["forward mode"]["level"] == "ok"
    assert found["memory"]["auto-budget-mib"] == pytest.approx(found["memory"]["free-mib"] / 2, abs=1)


def test_a_device_that_is_not_there_ends_the_examination_with_status_1() -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "cuda:77"])
    assert result.exit_code == 1
    assert "problem  accelerator: model.device is 'cuda:77'" in result.stdout
    assert "memory" not in result.stdout


def test_a_quantisation_that_nobody_knows_is_refused() -> None:
    result = CliRunner().invoke(app, ["doctor", "--quantization", "nf5"])
    assert result.exit_code == 2
    assert "allowed are none, nf4, fp4, int8" in result.stderr


@pytest.mark.parametrize(("needed", "level"), [(True, "problem"), (False, "note")])
def test_a_wheel_without_the_kernel_is_found_when_the_kernel_runs(
    needed: bool, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with bitsandbytes on a Jetson: it imports, and quantises, and fails at the first product."""

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nand more")

    monkeypatch.setattr("spry_app.models.quantized.dequantize_4bit", fails)
    found = training("nf4", "cpu", needed)
    assert found.level == level
    assert "no kernel image is available" in found.sentence
    assert 'model.quantization="none"' in found.sentence


def test_a_kernel_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is right with a tangent that is not."""
    monkeypatch.setattr("spry_app.autodiff.losses.torch.bmm", lambda a, b: 2 * (a @ b))
    found = training("none", "cpu", needed=True)
    assert found.level == "problem"
    assert "Self-test of forward mode failed" in found.sentence


def test_missing_and_old_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "requires", lambda _: ["numpy>=999", "not-there>=1", 'pytest>=999; extra == "dev"'])
    found = machine.software()
    assert found.level == "problem"
    assert "(wanted: >=999)" in found.sentence
    assert "not-there is missing" in found.sentence
    assert "pytest" not in found.sentence


def test_a_clock_that_stands_before_the_installation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.time, "time", lambda: 1e9)
    found = machine.clock()
    assert (found.level, found.values["now"]) == ("problem", "2001-09-09 01:46:40 UTC")


def test_a_full_disk_is_noted_and_one_that_is_read_only_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1024**2))
    assert machine.disk().level == "note"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert machine.disk().level == "problem"


def certificate(folder: Path, name: str, address: str = "127.0.0.1", days: float = 90.0) -> tuple[Path, Path, Path]:
    """Certificate of a CA, of a server that it vouches for, and the server's key."""
    now = datetime.datetime.now(datetime.UTC)

    def make(subject: str, key: Any, issuer: str, signer: Any, until: float, *more: tuple[Any, bool]) -> bytes:
        def named(common: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

        builder = x509.CertificateBuilder().subject_name(named(subject)).issuer_name(named(issuer))
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=99))
        builder = builder.not_valid_after(now + datetime.timedelta(days=until))
        for extension, critical in more:
            builder = builder.add_extension(extension, critical)
        return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    ca, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    paths = [folder / f"{name}-{part}.pem" for part in ("ca", "server", "key")]
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    identity = x509.SubjectKeyIdentifier.from_public_key(ca.public_key())
    vouched = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key())
    basic = x509.BasicConstraints(ca=True, path_length=None)
    paths[0].write_bytes(make("ca", ca, "ca", ca, 99, (basic, True), (usage, True), (identity, False)))
    paths[1].write_bytes(make("server", key, "ca", ca, days, (names, False), (vouched, False)))
    form = serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    paths[2].write_bytes(key.private_bytes(*form))
    return paths[0], paths[1], paths[2]


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and CA of a real one, with TLS."""
    folder = tmp_path_factory.mktemp("superlink")
    ca, server, key = certificate(folder, "good")
    port = free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--ssl-ca-certfile", str(ca), "--ssl-certfile", str(server)]
    with Processes(environment(folder), folder) as processes:
        command = ["flower-superlink", *options, "--ssl-keyfile", str(key)]
        process = processes.start(command, folder / "log")
        deadline = time.monotonic() + 60
        while not _answers(port, ca):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        processes.note_descendants()
        yield f"127.0.0.1:{port}", ca


def _answers(port: int, ca: Path) -> bool:
    context = ssl.create_default_context(cafile=ca)
    with contextlib.closing(HTTPSConnection("127.0.0.1", port, timeout=1, context=context)) as request:
        try:
            request.request("GET", "/health")
            return request.getresponse().status == 200
        except (OSError, HTTPException):
            return False


def test_a_superlink_with_tls_is_reached_and_trusted_by_its_ca_alone(
    superlink: tuple[str, Path], tmp_path: Path
) -> None:
    address, ca = superlink
    found = connection.superlink(address, ca, insecure=False)
    assert (found.level, found.values["address"]) == ("ok", address), found
    assert "with TLS, its certificate valid for 90 more days" in found.sentence or "89" in found.sentence
    other, _, _ = certificate(tmp_path, "other")
    stranger = connection.superlink(address, other, insecure=False)
    assert stranger.level == "problem"
    assert "not trusted" in stranger.sentence
    assert "--root-certificates" in connection.superlink(address, None, insecure=False).sentence
    assert "leave --insecure out" in connection.superlink(address, None, insecure=True).sentence
    (*_, (name, last)) = examine(address=address, root_certificates=ca)
    assert (name, last.level) == ("superlink", "ok")


class Health(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("options", "level", "sentence"),
    [
        ({}, "ok", "90 more days|89 more days"),
        ({"days": 3.0}, "note", "Renew it soon"),
        ({"days": -3.0}, "problem", "expired.*renew it, or set the clock"),
        ({"address": "10.9.8.7"}, "problem", "use the name or address that the certificate was made for"),
        ({"plain": True}, "problem", "does not speak TLS.*--insecure"),
    ],
)
def test_certificates_that_end_or_are_of_another_are_told_apart(
    options: dict, level: str, sentence: str, tmp_path: Path
) -> None:
    options = dict(options)
    plain = options.pop("plain", False)
    ca, server, key = certificate(tmp_path, "x", **options)
    with HTTPServer(("127.0.0.1", 0), Health) as http:
        if not plain:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(server, key)
            http.socket = context.wrap_socket(http.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        try:
            found = connection.superlink(f"127.0.0.1:{http.server_port}", ca, insecure=False)
        finally:
            http.shutdown()
    assert found.level == level, found
    assert re.search(sentence, found.sentence), found


def test_a_server_that_is_none_or_no_superlink_is_told_apart() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        found = connection.superlink(f"127.0.0.1:{closed.getsockname()[1]}", None, insecure=True)
    assert "does not answer" in found.sentence
    with HTTPServer(("127.0.0.1", 0), type("Other", (Health,), {"status": 404})) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{http.server_port}"
        assert "(status 404)" in connection.superlink(address, None, insecure=True).sentence
        http.shutdown()
    assert "must be host:port" in connection.superlink("localhost", None, insecure=True).sentence
    missing = connection.superlink("localhost:1", Path("/not/there.pem"), insecure=False)
    assert "--root-certificates=/not/there.pem cannot be read" in missing.sentence
