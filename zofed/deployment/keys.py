"""Keys and certificates of a federation on separate machines: made, checked, listed. Nothing here knows Flower.

A folder of keys, on the server:

    ca.key, ca.crt          the certificate authority (CA): signs server certificates; nodes trust ca.crt alone
    server.key, server.crt  what the SuperLink, and a proxy before it, show to nodes
    enrolled/NAME.pub       the enrolment list: one OpenSSH public key for each node that may connect
    nodes/NAME.key          private keys of nodes made here, until they are moved to their nodes
"""

import base64
import hashlib
import ipaddress
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from zofed.base import shell
from zofed.base.errors import UserError

ALWAYS = ("localhost", "127.0.0.1", "::1")  # what the server's own commands, and a proxy on it, connect to
CA_DAYS = 3650
SERVER_DAYS = 365
EARLIER = timedelta(hours=1)  # certificates begin so much before now, for machines whose clocks are behind
LARGEST_FILE = 64 * 1024  # bytes of a key or a certificate; a larger file is neither
LONGEST_NAME = 64

CA_KEY, CA, SERVER_KEY, SERVER = "ca.key", "ca.crt", "server.key", "server.crt"
ENROLLED, NODES = "enrolled", "nodes"

# What to do about a file of the server's folder that is damaged.
REMEDIES = {
    CA_KEY: "bring it back from a copy, or make new keys with zofed keys init and another --out",
    CA: "bring it back from a copy, or make new keys with zofed keys init and another --out",
    SERVER_KEY: "make a new one with zofed keys renew",
    SERVER: "make a new one with zofed keys renew and every name and address by which nodes reach the server",
}

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


# ---- making --------------------------------------------------------------------------------------


def make(out: Path, hosts: Sequence[str], nodes: Sequence[str] = (), days: int = SERVER_DAYS) -> None:
    """Make the folder `out` of a server: a CA, a certificate for `hosts` and ALWAYS, the keys of `nodes`.

    days: how long the server certificate lasts. The folder appears whole or not at all. Raises UserError for names that
    cannot be and for a folder that holds anything already.
    """
    names = _alternatives(hosts)
    for node in nodes:
        check_name(node)
    if twice := sorted({node for node in nodes if nodes.count(node) > 1}):
        raise UserError(f"node {twice[0]!r} is named twice: give every node a name of its own")
    if days > CA_DAYS:
        raise UserError(f"days = {days}: the CA lasts {CA_DAYS} days; give {CA_DAYS} or fewer")
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{str(out)!r} is there already, and keys are never overwritten: choose another --out, or make a new "
            "server certificate in it with zofed keys renew"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))  # mode 0700
    try:
        now = datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP384R1())
        authority = _authority(key, now)
        _write_new(folder / CA_KEY, _pem(key), 0o600)
        _write_new(folder / CA, authority.public_bytes(Encoding.PEM), 0o644)
        server_key, server = _issued(authority, key, names, now, days)
        _write_new(folder / SERVER_KEY, server_key, 0o600)
        _write_new(folder / SERVER, server, 0o644)
        (folder / ENROLLED).mkdir(mode=0o700)
        if nodes:
            (folder / NODES).mkdir(mode=0o700)
        for node in nodes:
            private, public = _node_pair(node)
            _write_new(folder / NODES / f"{node}.key", private, 0o600)
            _write_new(folder / ENROLLED / f"{node}.pub", public, 0o644)
        os.rename(folder, out)  # onto nothing or an empty folder only: whatever came in between stays
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def make_node(folder: Path, name: str) -> str:
    """Make NAME.key and NAME.pub in `folder`; the public key as text. Raises UserError where one is there already."""
    check_name(name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    private, public = _node_pair(name)
    for path in (folder / f"{name}.key", folder / f"{name}.pub"):
        if os.path.lexists(path):
            raise UserError(
                f"{str(path)!r} is there already, and keys are never overwritten: choose another name or --out, or "
                "remove it if no server has it enrolled"
            )
    _write_new(folder / f"{name}.key", private, 0o600)
    _write_new(folder / f"{name}.pub", public, 0o644)
    return public.decode().strip()


def renew(folder: Path, hosts: Sequence[str] = (), days: int = SERVER_DAYS) -> None:
    """Replace the server's key and certificate by new ones from the same CA; nodes need nothing new.

    hosts: names and addresses of the new one; without any, those of the present one. Raises UserError where the CA is
    missing or ends before.
    """
    for needed in (CA_KEY, CA):
        _check_there(folder / needed, "only the CA can sign: name the folder with its key with --keys")
    authority, key = certificate(folder / CA), _private_pem(folder / CA_KEY)
    _check_pair(folder / CA, authority, folder / CA_KEY, key)
    now = datetime.now(UTC)
    _check_now(folder / CA, authority, now, "make new keys with zofed keys init and give every node the new ca.crt")
    left = days_left(authority, now)
    if days > left:
        raise UserError(
            f"days = {days}: the CA ends {_date(authority.not_valid_after_utc)}; give --days {left} or fewer, or make "
            "new keys with zofed keys init"
        )
    names = hosts or names_of(certificate(folder / SERVER))
    if not names:
        raise UserError(f"{str(folder / SERVER)!r} names no host: {REMEDIES[SERVER]}")
    wanted = _alternatives(names)
    server_key, server = _issued(authority, key, wanted, now, days)
    # The key first: between the two renames they do not match, which check_server tells with the remedy.
    for name, content, mode in ((SERVER_KEY, server_key, 0o600), (SERVER, server, 0o644)):
        new = folder / f"{name}.new"
        new.unlink(missing_ok=True)
        _write_new(new, content, mode)
    for name in (SERVER_KEY, SERVER):
        os.replace(folder / f"{name}.new", folder / name)


def check_name(name: str) -> None:
    """Raise UserError for a node's name that is no plain file name, or hidden, or too long."""
    if not re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}", name):
        raise UserError(
            f"{name!r} cannot be a node's name: take 1 to {LONGEST_NAME} letters, digits, '-', '_' and '.', the first "
            "a letter, a digit or '_'"
        )


def _authority(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    # A name of its own tells certificates of several CAs apart in error messages.
    subject = x509.Name(
        [
            x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "zofed"),
            x509.NameAttribute(x509.NameOID.COMMON_NAME, f"zofed CA {secrets.token_hex(4)}"),
        ]
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        _builder(subject, subject, key.public_key(), now, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA384())
    )


def _issued(
    authority: x509.Certificate,
    authority_key: PrivateKey,
    alternatives: list[x509.GeneralName],
    now: datetime,
    days: int,
) -> tuple[bytes, bytes]:
    """A server's new key and certificate, PEM. It has all that Python 3.13's strict check wants."""
    # P-256: every connection costs the server a signature, which is many times quicker than with P-384.
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "zofed server")])
    try:
        issuer_identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:  # a CA that somebody else made
        issuer_identifier = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    issued = (
        _builder(subject, authority.subject, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_identifier), critical=False
        )
        .sign(authority_key, hashes.SHA384())
    )
    return _pem(key), issued.public_bytes(Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _node_pair(name: str) -> tuple[bytes, bytes]:
    """A node's private and public key in OpenSSH's formats, the only ones Flower reads; P-384 as it makes itself."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, f"{_ssh_text(key.public_key())} {name}\n".encode()


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Create a file that was not there, with its mode from the first byte on, and see it to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _alternatives(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """What a certificate for these hosts says it is for, each once, those of ALWAYS last."""
    if not hosts:
        raise UserError("no host: name every name and address by which nodes reach the server")
    return list(dict.fromkeys(_general_name(host) for host in (*hosts, *ALWAYS)))


def _general_name(host: str) -> x509.GeneralName:
    """A DNS name or an IP address as certificates hold it. Raises UserError for anything else."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if address is not None:
        if address.is_unspecified or address.is_multicast or "%" in host:
            raise UserError(f"host {host!r} is no address that nodes can connect to: name the server's own")
        return x509.IPAddress(address)
    label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    if len(host) > 253 or not re.fullmatch(rf"({label}\.)*{label}", host) or host.rpartition(".")[2].isdigit():
        raise UserError(
            f"host {host!r} is neither a DNS name nor an IP address: give it without scheme, port and brackets, such "
            "as fed.example.org or 192.0.2.7"
        )
    return x509.DNSName(host.lower())


# ---- reading -------------------------------------------------------------------------------------


def certificate(path: Path, remedy: str = "") -> x509.Certificate:
    """The certificate in a file, the first of several. Raises UserError, with the remedy, for anything else."""
    remedy = remedy or REMEDIES.get(path.name, "copy it again from where it was made")
    try:
        raw = _content(path)
        raw.decode("ascii")  # as Flower does
        found = x509.load_pem_x509_certificate(raw)
        _ = found.public_key(), found.extensions
    except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise UserError(f"{str(path)!r} is no certificate in PEM format, or damaged: {remedy}") from None
    return found


def names_of(found: x509.Certificate) -> list[str]:
    """The names and addresses a certificate is for."""
    try:
        alternatives = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in alternatives if isinstance(name, x509.DNSName | x509.IPAddress)]


def days_left(found: x509.Certificate, now: datetime | None = None) -> int:
    """Whole days until a certificate ends; negative afterwards."""
    return (found.not_valid_after_utc - (now or datetime.now(UTC))).days


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
        raise _unreadable(place, error) from error
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


# ---- checks before something starts --------------------------------------------------------------


def check_server(folder: Path, names: Iterable[str] = (), now: datetime | None = None) -> None:
    """Raise UserError unless a server can start with the keys in `folder`.

    They are there, private ones are readable by their owner alone, the server's certificate belongs to its key, was
    signed by the CA, is valid now and holds each of `names` (DNS names or addresses).
    """
    for needed in (CA, SERVER, SERVER_KEY):
        _check_there(folder / needed, "make keys with zofed keys init HOST, or name their folder with --keys")
    for private in (SERVER_KEY, CA_KEY):
        if (folder / private).exists():  # the CA's may be kept elsewhere
            _check_private(folder / private)
    authority, server = certificate(folder / CA), certificate(folder / SERVER)
    now, again = now or datetime.now(UTC), "make a new one with zofed keys renew"
    _check_now(folder / CA, authority, now, "make new keys with zofed keys init and give every node the new ca.crt")
    _check_now(folder / SERVER, server, now, again)
    _check_pair(folder / SERVER, server, folder / SERVER_KEY, _private_pem(folder / SERVER_KEY))
    try:
        server.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise UserError(f"{str(folder / SERVER)!r} was not signed by {str(folder / CA)!r}: {again}") from None
    held = names_of(server)
    for name in names:
        if str(_general_name(name).value) not in held:
            raise UserError(
                f"{str(folder / SERVER)!r} is not for {name!r} but for {', '.join(held)}: {again} and all its names"
            )


def check_node(key: Path, ca: Path, now: datetime | None = None) -> str:
    """The public key of a node, as text, once it can start with its private key and the CA's certificate.

    Raises UserError unless the key is there, readable by its owner alone, without a passphrase and of a curve Flower
    takes, and `ca` is the certificate of a CA that is valid now.
    """
    _check_there(key, "make one on this node with zofed keys node NAME")
    _check_private(key)
    raw = _content(key)
    make_one = "make one with zofed keys node NAME"
    if b"-----BEGIN" in raw and b"OPENSSH PRIVATE KEY" not in raw:
        raise UserError(f"{str(key)!r} is not in OpenSSH's format, the only one Flower reads: {make_one}")
    try:
        private = serialization.load_ssh_private_key(raw, password=None)
    except TypeError:
        raise UserError(
            f"{str(key)!r} has a passphrase, which nobody is there to type: {make_one}, or remove it with ssh-keygen -p"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"{str(key)!r} is no private key in OpenSSH's format: {make_one}") from None
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise UserError(f"{str(key)!r} is no ECDSA key, the only kind Flower takes: {make_one}")
    bring = "copy ca.crt from the server's folder of keys"
    _check_there(ca, bring)
    authority = certificate(ca, bring)
    if not _is_authority(authority):
        raise UserError(f"{str(ca)!r} is the certificate of a server, not of a CA: copy ca.crt from the server's keys")
    _check_now(ca, authority, now or datetime.now(UTC), "ask whoever runs the server for the new ca.crt")
    return _ssh_text(private.public_key())


def _is_authority(found: x509.Certificate) -> bool:
    try:
        return found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _check_there(path: Path, remedy: str) -> None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{str(path)!r} is not there: {remedy}") from None
    except OSError as error:  # a folder on the way that this user may not enter, links in a circle
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{str(path)!r} is no file: move it away, then {remedy}")


def _check_private(path: Path) -> None:
    found = path.stat().st_mode
    mode = stat.S_IMODE(found)
    if mode & 0o077 and stat.S_ISREG(found):
        closed = shell.command("chmod", "600", path)
        raise UserError(f"{str(path)!r} has mode {mode:04o}, and others than its owner can read it: {closed}")


def _check_now(path: Path, found: x509.Certificate, now: datetime, remedy: str) -> None:
    if now > found.not_valid_after_utc:
        raise UserError(f"{str(path)!r} expired {_date(found.not_valid_after_utc)}, and it is {_date(now)}: {remedy}")
    if now < found.not_valid_before_utc:
        raise UserError(
            f"{str(path)!r} is valid from {_date(found.not_valid_before_utc)} on, and this machine says it is "
            f"{_date(now)}: set its clock right, or {remedy}"
        )


def _check_pair(path: Path, found: x509.Certificate, key_path: Path, key: PrivateKey) -> None:
    if found.public_key() != key.public_key():
        raise UserError(
            f"{str(path)!r} belongs to another key than {str(key_path)!r}: copy both from where they were made, or "
            f"{REMEDIES[key_path.name]}"
        )


def _private_pem(path: Path) -> PrivateKey:
    """The private key of a CA or a server; RSA too, for a certificate that somebody else signed."""
    try:
        raw = _content(path)
        raw.decode("ascii")  # a mark before the first line, as some editors put it, is more than OpenSSL takes
        key = serialization.load_pem_private_key(raw, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        what = "no ECDSA or RSA key in PEM format without a passphrase, or damaged"
        raise UserError(f"{str(path)!r} is {what}: {REMEDIES[path.name]}")
    return key


def _public_text(path: Path) -> str:
    """The public key in a file, without its comment."""
    raw = _content(path)
    if b"PRIVATE KEY" in raw:
        raise UserError(f"{str(path)!r} is a private key: move it to its node, and put NAME.pub here in its place")
    try:
        key = serialization.load_ssh_public_key(raw.strip())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UserError(
            f"{str(path)!r} is no public ECDSA key in OpenSSH's format: make one with zofed keys node, and copy its "
            "NAME.pub here"
        )
    return _ssh_text(key)


def _ssh_text(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _content(path: Path) -> bytes:
    """What a small file holds."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise UserError(f"{str(path)!r} is no file: move it away, and put the key or certificate in its place")
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(raw) > LARGEST_FILE:
        raise UserError(f"{str(path)!r} has more than {LARGEST_FILE} bytes and is no key or certificate: copy it again")
    return raw


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{str(path)!r} cannot be read ({error.strerror}): check its owner and its mode, and who runs zofed"
    )


def _date(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
