"""Whether a node can talk to its SuperLink, and if not, why, in a sentence a person understands."""

import socket
import ssl
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import httpx

from zofed.errors import UserError

AHEAD_S, BEHIND_S = 5.0, 300.0  # how far a node's clock may be off: Flower's window for its signatures
TIMEOUT_S = 10.0
# OpenSSL's verification codes: https://docs.openssl.org/3.0/man3/X509_STORE_CTX_get_error/
NOT_YET_VALID, EXPIRED = 9, 10
OTHER_NAME = (62, 64)  # of a host, of an address
UNKNOWN_ISSUER = (18, 19, 20, 21)


@dataclass(frozen=True)
class Address:
    """HOST:PORT of a SuperLink."""

    host: str
    port: int

    @classmethod
    def of(cls, text: str) -> "Address":
        """Raises UserError for anything that is no HOST:PORT."""
        host, colon, port = text.rpartition(":")
        if not colon or not host.strip("[]") or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
            raise UserError(f"--superlink {text}: give HOST:PORT, such as server.example.org:8443")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def problem(address: Address, root_certificates: Path | None) -> str:
    """Why the SuperLink does not answer for now, which may pass; empty when it does.

    Raises UserError for what waiting does not mend: another certificate, a clock that is off.
    """
    context = ssl.create_default_context(cafile=root_certificates) if root_certificates else None
    try:
        with socket.create_connection((address.host, address.port), TIMEOUT_S) as plain:
            stream = context.wrap_socket(plain, server_hostname=address.host) if context else plain
            off = _clock_offset(stream, address)
    except ssl.SSLCertVerificationError as error:
        raise UserError(_certificate_problem(error, address, root_certificates)) from error
    except ssl.SSLError as error:
        if "WRONG_VERSION" in str(error) or "HTTP_REQUEST" in str(error):
            raise UserError(
                f"{address} does not speak TLS: give the port of zofed superlink, started with keys"
            ) from None
        return f"{address} breaks off the TLS handshake ({error.reason})"
    except (HTTPException, ConnectionResetError) as error:
        told = "" if context else ", perhaps because it speaks TLS: then give --ca and --key instead of --insecure"
        return f"{address} does not answer as a SuperLink does ({error!r}){told}"
    except socket.gaierror as error:
        return f"the name {address.host} is not known ({error.strerror}): is it spelled right?"
    except OSError as error:
        return f"nothing answers at {address} ({error.strerror or error}): is the SuperLink running and the port open?"
    if off is not None and not -BEHIND_S - 1 <= off <= AHEAD_S + 1:
        direction = "ahead of" if off > 0 else "behind"
        raise UserError(
            f"this machine's clock is {abs(off):.0f} s {direction} the SuperLink's: its signatures are taken up to "
            f"{AHEAD_S:.0f} s ahead and {BEHIND_S:.0f} s behind; set the clocks, best by NTP"
        )
    return ""


def _clock_offset(stream: socket.socket, address: Address) -> float | None:
    """Seconds this machine's clock is ahead of the server's, to a second; None where it does not tell its time."""
    stream.settimeout(TIMEOUT_S)
    connection = HTTPConnection(address.host, address.port)
    connection.sock = stream
    connection.request("GET", "/v1/fleet/")
    date = connection.getresponse().getheader("date")
    try:
        return time.time() - parsedate_to_datetime(date).timestamp() if date else None
    except ValueError:
        return None


def _certificate_problem(error: ssl.SSLCertVerificationError, address: Address, root: Path | None) -> str:
    code = error.verify_code
    if code in OTHER_NAME:
        return f"the certificate of {address} is not for {address.host}: renew it with zofed keys renew {address.host}"
    if code == EXPIRED:
        return f"the certificate of {address} has expired: renew it on the server with zofed keys renew"
    if code == NOT_YET_VALID:
        return f"the certificate of {address} is not valid yet: is this machine's clock right?"
    if code in UNKNOWN_ISSUER:
        return f"the certificate of {address} was not signed by {root}: bring its ca.crt, or is it another server?"
    return f"the certificate of {address} is not taken: {error.verify_message}"


def refusal(error: httpx.HTTPError, key: str) -> str:
    """What a SuperLink's refusal of a node means. key: the name of the node's public key."""
    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        if status in (401, 412):
            return (
                f"the SuperLink does not admit this node ({status}): copy {key} into the folder keys/enrolled on the "
                "server; a node that died without a word is admitted again after a minute"
            )
        return f"the SuperLink answers with status {status}: {error.response.text[:200]}"
    return f"the SuperLink does not answer: {error}"
