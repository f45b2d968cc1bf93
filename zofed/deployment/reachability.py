"""Whether a node can talk to its SuperLink, and if not, why, in a sentence a person understands."""

import os
import socket
import ssl
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar

import httpx

from zofed.base import proxies, shell
from zofed.base.errors import UserError

AHEAD_S, BEHIND_S = 5.0, 300.0  # how far a node's clock may be off: Flower's window for its signatures
TIMEOUT_S = 10.0
# OpenSSL's verification codes: https://docs.openssl.org/3.0/man3/X509_STORE_CTX_get_error/
NOT_YET_VALID, EXPIRED = 9, 10
OTHER_NAME = (62, 64)  # of a host, of an address
UNKNOWN_ISSUER = (18, 19, 20, 21)
OF_A_PROXY = (403, 407, 502, 503, 504)  # answers of a proxy that does not pass a request on

E = TypeVar("E", bound=BaseException)


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
        address = cls(host.strip("[]"), int(port))
        try:
            httpx.URL(f"http://{address}/")
        except httpx.InvalidURL:
            raise UserError(f"--superlink {text!r}: {address.host!r} is no name or address of a host") from None
        return address

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def problem(address: Address, root_certificates: Path | None) -> str:
    """Why the SuperLink does not answer for now, which may pass; empty when it does.

    It is asked the way Flower's processes go, through the same proxy if the environment names one. Raises UserError for
    what waiting does not mend: another certificate, a clock that is off.
    """
    scheme, context = (
        ("https", ssl.create_default_context(cafile=root_certificates)) if root_certificates else ("http", None)
    )
    through = proxies.in_the_way(scheme, address.host, os.environ)
    try:
        with httpx.Client(verify=context or False, timeout=TIMEOUT_S) as client:
            answer = client.get(f"{scheme}://{address}/v1/fleet/")
    except httpx.HTTPError as error:
        return _no_answer(error, address, root_certificates, through)
    if through and answer.status_code in OF_A_PROXY:
        return f"{address} cannot be reached (status {answer.status_code}): {through}"
    off = _clock_offset(answer.headers.get("date"))
    if off is not None and not -BEHIND_S - 1 <= off <= AHEAD_S + 1:
        direction = "ahead of" if off > 0 else "behind"
        raise UserError(
            f"this machine's clock is {abs(off):.0f} s {direction} the SuperLink's: its signatures are taken up to "
            f"{AHEAD_S:.0f} s ahead and {BEHIND_S:.0f} s behind; set the clocks, best by NTP"
        )
    return ""


def _no_answer(error: httpx.HTTPError, address: Address, root_certificates: Path | None, through: str) -> str:
    """What an error of the connection means, if it may pass; raises UserError if it will not.

    through: the sentence about the proxy that the connection went through, empty without one.
    """
    if certificate := _cause(error, ssl.SSLCertVerificationError):
        raise UserError(_certificate_problem(certificate, address, root_certificates, through)) from error
    if through:
        return f"nothing answers at {address} ({error}): {through}"
    if handshake := _cause(error, ssl.SSLError):
        if "WRONG_VERSION" in str(handshake) or "HTTP_REQUEST" in str(handshake):
            raise UserError(f"{address} does not speak TLS: give the port of zofed superlink, started with keys")
        return f"{address} breaks off the TLS handshake ({handshake.reason})"
    if unknown := _cause(error, socket.gaierror):
        return f"the name {address.host} is not known ({unknown.strerror}): is it spelled right?"
    if isinstance(error, httpx.ConnectError | httpx.TimeoutException):
        failed = _cause(error, OSError)
        why = (failed.strerror if failed else "") or str(error) or f"no answer in {TIMEOUT_S:.0f} s"
        return f"nothing answers at {address} ({why}): is the SuperLink running and the port open?"
    told = (
        "" if root_certificates else ", perhaps because it speaks TLS: then give --ca and --key instead of --insecure"
    )
    return f"{address} does not answer as a SuperLink does ({error!r}){told}"


def _cause(error: BaseException | None, kind: type[E]) -> E | None:
    """The first error of a kind among an error and those that led to it."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def _clock_offset(date: str | None) -> float | None:
    """Seconds this machine's clock is ahead of the server's, to a second; None where it does not tell its time."""
    try:
        return time.time() - parsedate_to_datetime(date).timestamp() if date else None
    except ValueError:
        return None


def _certificate_problem(error: ssl.SSLCertVerificationError, address: Address, root: Path | None, through: str) -> str:
    code = error.verify_code
    if code in OTHER_NAME:
        renewed = shell.command("zofed", "keys", "renew", address.host)
        return (
            f"the certificate of {address} is not for {address.host}: renew it on the server with {renewed} and the "
            "other names that it has, which zofed keys show tells"
        )
    if code == EXPIRED:
        return f"the certificate of {address} has expired: renew it on the server with zofed keys renew"
    if code == NOT_YET_VALID:
        return f"the certificate of {address} is not valid yet: is this machine's clock right?"
    if code in UNKNOWN_ISSUER:
        between = f"; {through}" if through else ""  # some proxies open TLS and sign anew
        told = f"the certificate of {address} was not signed by {root}: bring its ca.crt, or is it another server?"
        return told + between
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
