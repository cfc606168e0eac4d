"""`spry deploy`: what it makes is what openssl, ssh and Flower accept, is for its owner only, and is not replaced."""

import datetime
import ipaddress
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from typer.testing import CliRunner

from spry_app.cli import app


def deploy(folder: Path, command: str, *arguments: str, status: int = 0) -> str:
    """What a `spry deploy` command says; `status`: how it must end."""
    result = CliRunner().invoke(app, ["deploy", command, "--folder", str(folder), *arguments])
    assert result.exit_code == status, result.output
    return " ".join((result.stdout if status == 0 else result.stderr).split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A deployment with a server of two names and one node."""
    deploy(tmp_path / "deployment", "server", "192.168.1.5", "spry.local")
    deploy(tmp_path / "deployment", "node", "jetson")
    return tmp_path / "deployment"


def verify(folder: Path, name: x509.DNSName | x509.IPAddress, ca: Path) -> None:
    """As a TLS client does; raises VerificationError."""
    store = Store([x509.load_pem_x509_certificate(ca.read_bytes())])
    verifier = PolicyBuilder().store(store).build_server_verifier(name)
    verifier.verify(x509.load_pem_x509_certificate((folder / "server.crt").read_bytes()), [])


@pytest.mark.parametrize("name", ["192.168.1.5", "spry.local", "localhost", "127.0.0.1", "::1"])
def test_the_server_is_trusted_by_its_ca_under_each_of_its_names(folder: Path, name: str) -> None:
    try:
        general: x509.DNSName | x509.IPAddress = x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        general = x509.DNSName(name)
    verify(folder, general, folder / "ca.crt")


def test_another_name_and_another_ca_are_not_trusted(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationError):
        verify(folder, x509.DNSName("other.local"), folder / "ca.crt")
    deploy(tmp_path / "stranger", "server", "spry.local")
    with pytest.raises(VerificationError):
        verify(folder, x509.DNSName("spry.local"), tmp_path / "stranger" / "ca.crt")


def test_the_ca_can_sign_no_further_ca_and_the_server_nothing(folder: Path) -> None:
    ca, server = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("ca.crt", "server.crt"))
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_a_nodes_key_is_of_the_form_that_flower_reads_and_openssh_agrees(folder: Path) -> None:
    private = load_ssh_private_key((folder / "nodes" / "jetson.key").read_bytes(), None)
    public = load_ssh_public_key((folder / "nodes" / "jetson.pub").read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert (private.public_key(), public.curve.name) == (public, "secp384r1")
    derived = subprocess.run(
        ["ssh-keygen", "-y", "-f", str(folder / "nodes" / "jetson.key")], capture_output=True, text=True, check=True
    )
    assert derived.stdout.split()[:2] == (folder / "nodes" / "jetson.pub").read_text().split()[:2]


def test_keys_and_folders_are_for_their_owner_only(folder: Path) -> None:
    modes = {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    keys = {name: mode for name, mode in modes.items() if name.endswith(".key")}
    assert keys == {"ca.key": 0o600, "server.key": 0o600, "nodes/jetson.key": 0o600}
    assert (stat.S_IMODE(folder.stat().st_mode), modes["nodes"], modes["flwr"]) == (0o700, 0o700, 0o700)
    assert not [name for name in modes if name.rpartition("/")[2].startswith(".")], "left beside its place"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("arguments", [("server", "10.0.0.1"), ("node", "jetson")])
def test_nothing_is_replaced_unless_forced_and_the_ca_not_even_then(folder: Path, arguments: tuple[str, ...]) -> None:
    before = contents(folder)
    assert "Nothing was written" in deploy(folder, *arguments, status=2)
    assert contents(folder) == before
    deploy(folder, *arguments, "--force")
    changed = {path.name for path, content in contents(folder).items() if content != before[path]}
    assert changed == ({"server.crt", "server.key"} if arguments[0] == "server" else {"jetson.key", "jetson.pub"})


def test_a_registered_key_is_not_replaced_even_by_force(folder: Path) -> None:
    (folder / "nodes" / "jetson.id").write_text("123\n")
    assert "spry deploy remove jetson" in deploy(folder, "node", "jetson", "--force", status=2)


def test_what_is_printed_is_what_to_do_and_no_key(tmp_path: Path) -> None:
    folder = tmp_path / "deployment"
    said = deploy(folder, "server", "fd00::5", "--days", "30") + deploy(folder, "node", "laptop", "--port", "9000")
    assert "--superlink [fd00::5]:9000 --root-certificates ca.crt --auth-supernode-private-key laptop.key" in said
    for key in folder.rglob("*.key"):
        assert not [line for line in key.read_text().splitlines() if len(line) > 8 and line in said]


def test_a_renewed_certificate_has_the_same_names_and_the_nodes_need_nothing(folder: Path) -> None:
    before = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    ca = (folder / "ca.crt").read_bytes()
    deploy(folder, "renew", "--days", "800")
    after = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    names = [one.extensions.get_extension_for_class(x509.SubjectAlternativeName).value for one in (before, after)]
    assert names[0] == names[1]
    assert after.not_valid_after_utc - before.not_valid_after_utc > datetime.timedelta(days=402)
    assert (folder / "ca.crt").read_bytes() == ca
    verify(folder, x509.DNSName("spry.local"), folder / "ca.crt")


@pytest.mark.parametrize("name", ["192.168.1.5:8443", "http://spry", "", "-a", "300.1.1.1", "a b"])
def test_a_name_that_no_node_could_use_is_refused(tmp_path: Path, name: str) -> None:
    assert "without a port" in deploy(tmp_path / "deployment", "server", "--", name, status=2)
    assert not (tmp_path / "deployment").exists()


@pytest.mark.parametrize("name", ["../evil", "", "a.b", "a/b"])
def test_a_nodes_name_cannot_leave_the_folder(folder: Path, name: str) -> None:
    before = contents(folder)
    assert "letters, digits" in deploy(folder, "node", "--", name, status=2)
    assert contents(folder) == before


def test_a_missing_step_is_named(tmp_path: Path, folder: Path) -> None:
    assert "`spry deploy server` makes it" in deploy(tmp_path / "none", "node", "jetson", status=2)
    assert "`spry deploy node other` makes it" in deploy(folder, "register", "other", status=2)
    (folder / "ca.key").unlink()
    assert "bring the key" in deploy(folder, "renew", status=2)


def test_a_superlink_that_is_not_there_is_an_answer_and_not_a_wait(folder: Path) -> None:
    deploy(folder, "server", "spry.local", "--superlink", "127.0.0.1:1", "--force")
    assert "unavailable" in deploy(folder, "register", "jetson", status=2)
    assert not (folder / "nodes" / "jetson.id").exists()


def test_another_cas_key_is_refused(folder: Path, tmp_path: Path) -> None:
    deploy(tmp_path / "other", "server", "spry.local")
    (folder / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    assert "is not the key of" in deploy(folder, "renew", status=2)
