"""Files of a folder of keys: where each lies, read from disk or refused with a remedy. Nothing here knows Flower.

A folder of keys, on the server:

    ca.key, ca.crt          the certificate authority (CA): signs server certificates; nodes trust ca.crt alone
    server.key, server.crt  what the SuperLink, and a proxy before it, show to nodes
    enrolled/NAME.pub       the enrolment list: one OpenSSH public key for each node that may connect
    nodes/NAME.key          private keys of nodes made here, until they are moved to their nodes
"""

import base64
import hashlib
import re
import stat
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from zofed.base.errors import UserError
from zofed.deployment.certificates import PrivateKey

LARGEST_FILE = 64 * 1024  # bytes of a key or a certificate; a larger file is neither
LONGEST_NAME = 64

UNKNOWN = (UnsupportedAlgorithm, NotImplementedError)  # of curves and points that the library knows no way to read

CA_KEY, CA, SERVER_KEY, SERVER = "ca.key", "ca.crt", "server.key", "server.crt"
ENROLLED, NODES = "enrolled", "nodes"

# What to do about a file of the server's folder that is damaged.
REMEDIES = {
    CA_KEY: "bring it back from a copy, or make new keys with zofed keys init and another --out",
    CA: "bring it back from a copy, or make new keys with zofed keys init and another --out",
    SERVER_KEY: "make a new one with zofed keys renew",
    SERVER: "make a new one with zofed keys renew and every name and address by which nodes reach the server",
}


def check_name(name: str) -> None:
    """Raise UserError for a node's name that is no plain file name, or hidden, or too long."""
    if not re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}", name):
        raise UserError(
            f"{name!r} cannot be a node's name: take 1 to {LONGEST_NAME} letters, digits, '-', '_' and '.', the first "
            "a letter, a digit or '_'"
        )


def certificate(path: Path, remedy: str = "") -> x509.Certificate:
    """The certificate in a file, the first of several. Raises UserError, with the remedy, for anything else."""
    remedy = remedy or REMEDIES.get(path.name, "copy it again from where it was made")
    try:
        raw = content(path)
        raw.decode("ascii")  # as Flower does
        found = x509.load_pem_x509_certificate(raw)
        _ = found.public_key(), found.extensions
    except (ValueError, *UNKNOWN, x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType):
        raise UserError(f"{str(path)!r} is no certificate in PEM format, or damaged: {remedy}") from None
    return found


def private_pem(path: Path) -> PrivateKey:
    """The private key of a CA or a server; RSA too, for a certificate that somebody else signed.

    Raises UserError, with the remedy, for anything else.
    """
    try:
        raw = content(path)
        raw.decode("ascii")  # a mark before the first line, as some editors put it, is more than OpenSSL takes
        key = serialization.load_pem_private_key(raw, password=None)
    except (ValueError, TypeError, *UNKNOWN):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        what = "no ECDSA or RSA key in PEM format without a passphrase, or damaged"
        raise UserError(f"{str(path)!r} is {what}: {REMEDIES[path.name]}")
    return key


def enrolled(folder: Path) -> dict[str, str]:
    """The enrolment list of a folder of keys: public key by node, in OpenSSH's format, in the order of the names.

    Raises UserError for a list that is not there, for whatever in it is no public key that Flower takes, and for two
    files with one key: nothing is skipped silently.
    """
    place = folder / ENROLLED
    try:
        paths = sorted(place.iterdir())
    except FileNotFoundError:
        raise UserError(
            f"{str(place)!r} is not there: make keys with zofed keys init, or name their folder with --keys"
        ) from None
    except OSError as error:
        raise unreadable(place, error) from error
    found: dict[str, str] = {}
    holders: dict[str, str] = {}
    for path in paths:
        name = path.name.removesuffix(".pub")
        if name == path.name or not path.is_file():
            raise UserError(
                f"{str(path)!r} is no public key NAME.pub: the enrolment list holds nothing else; move it away"
            )
        check_name(name)
        text = _public_text(path)
        if text in holders:
            raise UserError(
                f"nodes {holders[text]!r} and {name!r} have the same key in {str(place)!r}: a node is known by its "
                "key; remove one file or make another key with zofed keys node"
            )
        holders[text] = name
        found[name] = text
    return found


def _public_text(path: Path) -> str:
    """The public key in a file, without its comment."""
    raw = content(path)
    if b"PRIVATE KEY" in raw:
        raise UserError(f"{str(path)!r} is a private key: move it to its node, and put NAME.pub here in its place")
    try:
        key = serialization.load_ssh_public_key(raw.strip())
    except (ValueError, *UNKNOWN):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UserError(
            f"{str(path)!r} is no public ECDSA key in OpenSSH's format: make one with zofed keys node, and copy its "
            "NAME.pub here"
        )
    return ssh_text(key)


def fingerprint(public_key: str) -> str:
    """The SHA-256 fingerprint of a public key in OpenSSH's format, as `ssh-keygen -l` prints it.

    Raises UserError for other text.
    """
    try:
        blob = base64.b64decode(public_key.split()[1], validate=True)
    except (IndexError, ValueError):
        raise UserError(
            f"{public_key[:40]!r} is no public key in OpenSSH's format: make one with zofed keys node"
        ) from None
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def ssh_text(key: ec.EllipticCurvePublicKey) -> str:
    """A public key in OpenSSH's format, without a comment."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def content(path: Path) -> bytes:
    """What a small file holds. Raises UserError for one above LARGEST_FILE, no plain file or unreadable."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise UserError(f"{str(path)!r} is no file: move it away, and put the key or certificate in its place")
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(raw) > LARGEST_FILE:
        raise UserError(f"{str(path)!r} has more than {LARGEST_FILE} bytes and is no key or certificate: copy it again")
    return raw


def unreadable(path: Path, error: OSError) -> UserError:
    """What to tell of a file that the system does not let us read."""
    return UserError(
        f"{str(path)!r} cannot be read ({error.strerror}): check its owner and its mode, and who runs zofed"
    )
