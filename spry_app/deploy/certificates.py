"""The CA of a deployment and the certificate of its server (X.509, TLS). Keys of nodes are in nodes.py."""

import datetime
import ipaddress
import re
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from spry_app.deploy.files import Folder, read, write
from spry_app.errors import SpryError

CA_DAYS = 3650
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""In every server certificate: the SuperLink's own processes and the gate reach it there."""
_HOST = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")
_SOME = datetime.timedelta(hours=1)


def make_server(folder: Folder, names: Sequence[str], days: int, force: bool) -> bool:
    """A certificate for `names` (host names, IPv4, IPv6), signed by the folder's CA; True if that was made too.

    The server's key is a new one each time. Raises SpryError.
    """
    subjects = [_general(name) for name in dict.fromkeys((*names, *LOOPBACK))]
    new_ca = not folder.ca_key.exists()
    if new_ca and folder.ca.exists():
        raise SpryError(f"{folder.ca} is there without {folder.ca_key.name}: bring the key, or remove the certificate.")
    files, (ca, ca_key) = {}, _new_ca() if new_ca else _ca(folder)
    if new_ca:
        files = {folder.ca: _pem(ca), folder.ca_key: _key_pem(ca_key)}
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = _builder(key.public_key(), subjects[0].value, ca.subject, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(usage, critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(subjects), critical=False)
    builder = builder.add_extension(_authority(ca), critical=False)
    certificate = builder.sign(ca_key, hashes.SHA256())
    write(files | {folder.server: _pem(certificate), folder.server_key: _key_pem(key)}, force)
    return new_ca


def server_names(folder: Folder) -> list[str]:
    """Names and addresses of the server's certificate, those of loopback last."""
    certificate = x509.load_pem_x509_certificate(read(folder.server, "spry deploy server"))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def valid_until(folder: Folder) -> datetime.date:
    return x509.load_pem_x509_certificate(read(folder.server, "spry deploy server")).not_valid_after_utc.date()


def _new_ca() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Good for server certificates only: no CA below it."""
    key = ec.generate_private_key(ec.SECP384R1())
    builder = _builder(key.public_key(), "Spry deployment CA", _called("Spry deployment CA"), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
    return builder.sign(key, hashes.SHA384()), key


def _ca(folder: Folder) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    ca = x509.load_pem_x509_certificate(read(folder.ca, "spry deploy server"))
    key = serialization.load_pem_private_key(read(folder.ca_key, "spry deploy server"), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != ca.public_key():
        raise SpryError(f"{folder.ca_key} is not the key of {folder.ca}; put back the pair that was made together.")
    if ca.not_valid_after_utc < datetime.datetime.now(datetime.UTC):
        raise SpryError(f"{folder.ca} is no longer valid: remove it and its key, and every node needs the new one.")
    return ca, key


def _builder(key: ec.EllipticCurvePublicKey, name: object, issuer: x509.Name, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(_called(str(name))).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    # Boards without a battery have clocks that are a little behind.
    builder = builder.not_valid_before(now - _SOME).not_valid_after(now + datetime.timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _authority(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    subject = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject)


def _key_usage(**used: bool) -> x509.KeyUsage:
    every = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return x509.KeyUsage(**(every | used))


def _called(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if not _HOST.fullmatch(name) or re.fullmatch(r"[\d.]+", name):
            raise SpryError(
                f"The server's name is {name!r}; it must be a host name or an address as nodes will use it, without a "
                "port, e.g. spry.local or 192.168.1.5."
            ) from None
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
