"""Can this machine reach the SuperLink, and trust it? Nothing is sent but a question after its health."""

import socket
import ssl
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from spry_app.findings import Finding, Values

TIMEOUT_S = 5.0
SOON_DAYS = 14


def superlink(address: str, root_certificates: Path | None, insecure: bool) -> Finding:
    """address: host:port, as of `flower-supernode --superlink`. insecure: without TLS."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        return Finding("problem", f"--superlink is {address!r}; it must be host:port, e.g. 192.168.1.5:8000.")
    context = None
    if not insecure:
        try:
            context = ssl.create_default_context(cafile=root_certificates)
        except (OSError, ssl.SSLError) as error:
            return Finding("problem", f"--root-certificates={root_certificates} cannot be read ({error}).")
    started = time.monotonic()
    try:
        with socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S) as plain:
            connected_ms = 1e3 * (time.monotonic() - started)
            if context is None:
                return _healthy(plain, address, "without TLS", connected_ms)
            with context.wrap_socket(plain, server_hostname=host.strip("[]")) as secure:
                days = _days_left(secure)
                said = f"with TLS, its certificate valid for {days:.0f} more days"
                found = _healthy(secure, address, said, connected_ms)
                if found.level == "ok" and days < SOON_DAYS:
                    return Finding("note", f"{found.sentence} Renew it soon.", found.values)
                return found
    except ssl.SSLCertVerificationError as error:
        return Finding("problem", f"{address} has a certificate that is not trusted: {_reason(error)}")
    except ssl.SSLError as error:
        return Finding(
            "problem",
            f"{address} does not speak TLS ({error.reason}): start the SuperLink with its certificates, or, on a "
            "network of your own, give --insecure here and there.",
        )
    except OSError as error:
        return Finding(
            "problem",
            f"{address} does not answer ({error or type(error).__name__}): is the SuperLink up, is this its address, "
            "and does a firewall let this machine in?",
        )


def _healthy(connected: socket.socket, address: str, how: str, milliseconds: float) -> Finding:
    values: Values = {"address": address, "connected-ms": round(milliseconds, 1)}
    request = HTTPConnection(address, timeout=TIMEOUT_S)
    request.sock = connected
    try:
        request.request("GET", "/health")
        status = request.getresponse().status
    except (OSError, HTTPException) as error:
        hint = ": it may speak TLS (leave --insecure out)" if "without" in how else ""
        return Finding(
            "problem", f"{address} is no SuperLink that answers {how} ({error or 'no answer'}){hint}.", values
        )
    if status != 200:
        return Finding("problem", f"{address} answers {how}, but not as a SuperLink does (status {status}).", values)
    return Finding("ok", f"The SuperLink at {address} answers {how} ({milliseconds:.0f} ms).", values)


def _days_left(secure: ssl.SSLSocket) -> float:
    until = str((secure.getpeercert() or {})["notAfter"])
    return (ssl.cert_time_to_seconds(until) - time.time()) / 86_400


def _reason(error: ssl.SSLCertVerificationError) -> str:
    said = error.verify_message
    advice = {
        10: "renew it, or set the clock of this machine",
        9: "set the clock of this machine",
        18: "give the CA's certificate by --root-certificates",
        19: "give the CA's certificate by --root-certificates",
        20: "give the CA's certificate by --root-certificates",
        62: "use the name or address that the certificate was made for, or make one for this",
        64: "use the name or address that the certificate was made for, or make one for this",
    }
    return f"{said}. To mend it, {advice.get(error.verify_code, 'make the certificate anew')}."
