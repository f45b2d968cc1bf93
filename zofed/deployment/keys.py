"""Keys and certificates of a federation on separate machines: made and renewed. Where each lies: `key_files`."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from zofed.base.errors import UserError
from zofed.deployment import certificates, key_checks, key_files
from zofed.deployment.certificates import CA_DAYS, SERVER_DAYS
from zofed.deployment.key_files import CA, CA_KEY, ENROLLED, NODES, REMEDIES, SERVER, SERVER_KEY


def make(out: Path, hosts: Sequence[str], nodes: Sequence[str] = (), days: int = SERVER_DAYS) -> None:
    """Make the folder `out` of a server: a CA, a certificate for `hosts` and this machine, the keys of `nodes`.

    days: how long the server certificate lasts. The folder appears whole or not at all. Raises UserError for names that
    cannot be and for a folder that holds anything already.
    """
    names = certificates.alternatives(hosts)
    for node in nodes:
        key_files.check_name(node)
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
        authority = certificates.authority(key, now)
        _write_new(folder / CA_KEY, certificates.pem(key), 0o600)
        _write_new(folder / CA, authority.public_bytes(Encoding.PEM), 0o644)
        server_key, server = certificates.issued(authority, key, names, now, days)
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
    key_files.check_name(name)
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
        key_checks.check_there(folder / needed, "only the CA can sign: name the folder with its key with --keys")
    authority, key = key_files.certificate(folder / CA), key_files.private_pem(folder / CA_KEY)
    key_checks.check_pair(folder / CA, authority, folder / CA_KEY, key)
    now = datetime.now(UTC)
    give_anew = "make new keys with zofed keys init and give every node the new ca.crt"
    key_checks.check_now(folder / CA, authority, now, give_anew)
    left = certificates.days_left(authority, now)
    if days > left:
        end = certificates.date(authority.not_valid_after_utc)
        raise UserError(
            f"days = {days}: the CA ends {end}; give --days {left} or fewer, or make new keys with zofed keys init"
        )
    names = hosts or certificates.names_of(key_files.certificate(folder / SERVER))
    if not names:
        raise UserError(f"{str(folder / SERVER)!r} names no host: {REMEDIES[SERVER]}")
    wanted = certificates.alternatives(names)
    server_key, server = certificates.issued(authority, key, wanted, now, days)
    # The key first: between the two renames they do not match, which check_server tells with the remedy.
    for name, content, mode in ((SERVER_KEY, server_key, 0o600), (SERVER, server, 0o644)):
        new = folder / f"{name}.new"
        new.unlink(missing_ok=True)
        _write_new(new, content, mode)
    for name in (SERVER_KEY, SERVER):
        os.replace(folder / f"{name}.new", folder / name)


def _node_pair(name: str) -> tuple[bytes, bytes]:
    """A node's private and public key in OpenSSH's formats, the only ones Flower reads; P-384 as it makes itself."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, f"{key_files.ssh_text(key.public_key())} {name}\n".encode()


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Create a file that was not there, with its mode from the first byte on, and see it to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
