"""Checks of keys and certificates before a server or a node starts, each refusal with its remedy."""

import stat
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from zofed.base import shell
from zofed.base.errors import UserError
from zofed.deployment import certificates, key_files
from zofed.deployment.certificates import PrivateKey
from zofed.deployment.key_files import CA, CA_KEY, REMEDIES, SERVER, SERVER_KEY


def check_server(folder: Path, names: Iterable[str] = (), now: datetime | None = None) -> None:
    """Raise UserError unless a server can start with the keys in `folder`.

    They are there, private ones are readable by their owner alone, the server's certificate belongs to its key, was
    signed by the CA, is valid now and holds each of `names` (DNS names or addresses).
    """
    for needed in (CA, SERVER, SERVER_KEY):
        check_there(folder / needed, "make keys with zofed keys init HOST, or name their folder with --keys")
    for private in (SERVER_KEY, CA_KEY):
        if (folder / private).exists():  # the CA's may be kept elsewhere
            _check_private(folder / private)
    authority, server = key_files.certificate(folder / CA), key_files.certificate(folder / SERVER)
    now, again = now or datetime.now(UTC), "make a new one with zofed keys renew"
    check_now(folder / CA, authority, now, "make new keys with zofed keys init and give every node the new ca.crt")
    check_now(folder / SERVER, server, now, again)
    check_pair(folder / SERVER, server, folder / SERVER_KEY, key_files.private_pem(folder / SERVER_KEY))
    try:
        server.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise UserError(f"{str(folder / SERVER)!r} was not signed by {str(folder / CA)!r}: {again}") from None
    held = certificates.names_of(server)
    for name in names:
        if str(certificates.general_name(name).value) not in held:
            raise UserError(
                f"{str(folder / SERVER)!r} is not for {name!r} but for {', '.join(held)}: {again} and all its names"
            )


def check_node(key: Path, ca: Path, now: datetime | None = None) -> str:
    """The public key of a node, as text, once it can start with its private key and the CA's certificate.

    Raises UserError unless the key is there, readable by its owner alone, without a passphrase and of a curve Flower
    takes, and `ca` is the certificate of a CA that is valid now.
    """
    check_there(key, "make one on this node with zofed keys node NAME")
    _check_private(key)
    raw = key_files.content(key)
    make_one = "make one with zofed keys node NAME"
    if b"-----BEGIN" in raw and b"OPENSSH PRIVATE KEY" not in raw:
        raise UserError(f"{str(key)!r} is not in OpenSSH's format, the only one Flower reads: {make_one}")
    try:
        private = serialization.load_ssh_private_key(raw, password=None)
    except TypeError:
        raise UserError(
            f"{str(key)!r} has a passphrase, which nobody is there to type: {make_one}, or remove it with ssh-keygen -p"
        ) from None
    except (ValueError, *key_files.UNKNOWN):
        raise UserError(f"{str(key)!r} is no private key in OpenSSH's format: {make_one}") from None
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise UserError(f"{str(key)!r} is no ECDSA key, the only kind Flower takes: {make_one}")
    bring = "copy ca.crt from the server's folder of keys"
    check_there(ca, bring)
    authority = key_files.certificate(ca, bring)
    if not certificates.is_authority(authority):
        raise UserError(f"{str(ca)!r} is the certificate of a server, not of a CA: copy ca.crt from the server's keys")
    check_now(ca, authority, now or datetime.now(UTC), "ask whoever runs the server for the new ca.crt")
    return key_files.ssh_text(private.public_key())


def check_there(path: Path, remedy: str) -> None:
    """Raise UserError, with the remedy, unless a plain file is there."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{str(path)!r} is not there: {remedy}") from None
    except OSError as error:  # a folder on the way that this user may not enter, links in a circle
        raise key_files.unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{str(path)!r} is no file: move it away, then {remedy}")


def _check_private(path: Path) -> None:
    found = path.stat().st_mode
    mode = stat.S_IMODE(found)
    if mode & 0o077 and stat.S_ISREG(found):
        closed = shell.command("chmod", "600", path)
        raise UserError(f"{str(path)!r} has mode {mode:04o}, and others than its owner can read it: {closed}")


def check_now(path: Path, found: x509.Certificate, now: datetime, remedy: str) -> None:
    """Raise UserError, with the remedy, unless the certificate `found` in a file is valid now."""
    begin, end = found.not_valid_before_utc, found.not_valid_after_utc
    if now > end:
        raise UserError(f"{str(path)!r} expired {certificates.date(end)}, and it is {certificates.date(now)}: {remedy}")
    if now < begin:
        raise UserError(
            f"{str(path)!r} is valid from {certificates.date(begin)} on, and this machine says it is "
            f"{certificates.date(now)}: set its clock right, or {remedy}"
        )


def check_pair(path: Path, found: x509.Certificate, key_path: Path, key: PrivateKey) -> None:
    """Raise UserError unless a certificate and a private key, each read from its file, belong together."""
    if found.public_key() != key.public_key():
        raise UserError(
            f"{str(path)!r} belongs to another key than {str(key_path)!r}: copy both from where they were made, or "
            f"{REMEDIES[key_path.name]}"
        )
