"""Keys and certificates: made, renewed, checked, shown; real handshakes and Flower's own readers take them."""

import argparse
import os
import shutil
import socket
import ssl
import stat
import subprocess
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from flwr.cli.supernode.register import try_load_public_key
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication
from hypothesis import given
from hypothesis import strategies as st

from zofed.base.errors import UserError
from zofed.deployment import certificates, key_checks, key_files, keys

HOSTS = ("fed.example.org", "192.0.2.7", "2001:db8::7")

# A public key and what `ssh-keygen -l` of OpenSSH 9.2 prints for it.
PUBLIC = (
    "ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQAAAAIbmlzdHAzODQAAABhBKsvVvwb7cCFM28Qn3XRuichTfvTOdHKdpA/1nL9"
    "LWoWJ3QWZs09XFzWwRCh+IKhzTd9sT906xkT9kFkXBLghZc1/Klx/tfXlSdMSxKLmiiwGEGCcLp8QKSrRN5VYUeTMw=="
)
FINGERPRINT = "SHA256:8hN7g1n+yKrNyFLcJmXsOAycYmlFcCtMatNnd9vTHwo"

needs_ssh_keygen = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="no ssh-keygen on PATH")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder of keys for HOSTS with one node."""
    keys.make(tmp_path / "keys", HOSTS, ["gpu0"])
    return tmp_path / "keys"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def handshake(folder: Path, ca: Path, name: str, flags: int = 0) -> str:
    """One TLS connection to a server with the folder's keys, by a client that trusts `ca` and wants `name`.

    Returns the protocol's version. Raises ssl.SSLCertVerificationError where the client refuses.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(ca)
    client.verify_flags |= flags
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as connection:
                connection.recv(1)
        except OSError:  # the client left: what is tested is its own error
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=name) as connection:
            connection.send(b"x")
            return connection.version() or ""
    finally:
        ours.close()
        thread.join()


def expired(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the folder a server certificate that ended yesterday."""

    class Earlier(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) - timedelta(days=3)

    with monkeypatch.context() as patched:
        patched.setattr(certificates, "EARLIER", timedelta(days=10))
        patched.setattr(keys, "datetime", Earlier)
        patched.setattr(key_checks, "check_now", lambda *_: None)
        keys.renew(folder, ["fed.example.org"], days=2)


# ---- making --------------------------------------------------------------------------------------


def test_private_files_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)  # nothing but the program itself keeps others out
    try:
        keys.make(tmp_path / "keys", HOSTS, ["gpu0"])
        keys.make_node(tmp_path / "own", "gpu1")
    finally:
        os.umask(before)
    folder = tmp_path / "keys"
    assert {mode(path) for path in (folder, folder / "enrolled", folder / "nodes", tmp_path / "own")} == {0o700}
    private = [folder / "ca.key", folder / "server.key", folder / "nodes" / "gpu0.key", tmp_path / "own" / "gpu1.key"]
    assert {mode(path) for path in private} == {0o600}
    holders = {path for path in tmp_path.rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()}
    assert holders == set(private)


def test_the_certificate_is_for_every_host_and_for_this_machine(made: Path) -> None:
    assert certificates.names_of(key_files.certificate(made / "server.crt")) == [
        *HOSTS,
        "localhost",
        "127.0.0.1",
        "::1",
    ]
    for name in (*HOSTS, *certificates.ALWAYS, "FED.example.org"):
        assert handshake(made, made / "ca.crt", name, ssl.VERIFY_X509_STRICT) == "TLSv1.3"


def test_a_client_refuses_another_name(made: Path) -> None:
    for name in ("example.org", "a.fed.example.org", "192.0.2.8"):
        with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
            handshake(made, made / "ca.crt", name)


def test_a_client_refuses_another_ca(made: Path, tmp_path: Path) -> None:
    keys.make(tmp_path / "other", HOSTS)
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        handshake(made, tmp_path / "other" / "ca.crt", "localhost")


def test_a_client_refuses_an_expired_certificate(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expired(made, monkeypatch)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(made, made / "ca.crt", "localhost")
    with pytest.raises(UserError, match=r"server.crt' expired .* UTC, and it is .* UTC: .*zofed keys renew"):
        key_checks.check_server(made)


def test_a_server_certificate_cannot_sign_others(made: Path, tmp_path: Path) -> None:
    """Whoever steals server.key must not be able to make certificates that nodes believe."""
    stolen = serialization.load_pem_private_key((made / "server.key").read_bytes(), None)
    assert isinstance(stolen, ec.EllipticCurvePrivateKey)
    forged = tmp_path / "forged"
    forged.mkdir()
    now = datetime.now(UTC)
    server = key_files.certificate(made / "server.crt")
    key, leaf = certificates.issued(server, stolen, [x509.DNSName("bank.example")], now, days=1)
    (forged / "server.key").write_bytes(key)
    (forged / "server.crt").write_bytes(leaf + (made / "server.crt").read_bytes())
    with pytest.raises(ssl.SSLCertVerificationError, match="invalid CA certificate"):
        handshake(forged, made / "ca.crt", "bank.example")


@pytest.mark.parametrize("what", ["keys", "file", "link"])
def test_nothing_is_overwritten(made: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    if what == "keys":
        out = made
    elif what == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "empty")
        (tmp_path / "empty").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"is there already, .* never overwritten: choose another --out"):
        keys.make(out, HOSTS)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("there", ["gpu0.key", "gpu0.pub"])
def test_no_key_of_a_node_is_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(UserError, match=rf"{there}' is there already, .* never overwritten"):
        keys.make_node(tmp_path, "gpu0")
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("theirs")
    (tmp_path / "a.key").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        keys._write_new(tmp_path / "a.key", b"ours", 0o600)
    assert (tmp_path / "target").read_text() == "theirs"


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keys, "_node_pair", full)
    with pytest.raises(OSError, match="No space"):
        keys.make(tmp_path / "keys", HOSTS, ["gpu0"])
    assert list(tmp_path.iterdir()) == []


@given(st.text(st.sampled_from("ab9-_./\\ ~\0é\n"), max_size=70))
def test_a_name_of_a_node_is_a_plain_file_name_or_refused(name: str) -> None:
    try:
        key_files.check_name(name)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert Path(f"/keys/{name}.key").resolve().parent == Path("/keys")
        assert 1 <= len(name) <= 64 and name[0] not in "-." and name.isascii() and name.isprintable()


@pytest.mark.parametrize("name", ["gpu0", "site-b_2.a", "A", "_x", "9" * 64])
def test_plain_names_of_nodes_are_taken(name: str) -> None:
    key_files.check_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "../gpu0", "a/b", "-h", ".hidden", "a b", "a\n", "é", "9" * 65, "a\0"])
def test_other_names_of_nodes_are_refused(tmp_path: Path, name: str) -> None:
    for make in (lambda: keys.make_node(tmp_path, name), lambda: keys.make(tmp_path / "keys", HOSTS, [name])):
        with pytest.raises(UserError, match="cannot be a node's name: take 1 to 64 letters"):
            make()
    assert list(tmp_path.iterdir()) == []


def test_two_nodes_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="node 'a' is named twice"):
        keys.make(tmp_path / "keys", HOSTS, ["a", "b", "a"])


@pytest.mark.parametrize(
    "host",
    ["https://fed.example.org", "fed.example.org:8443", "[::1]", "*.example.org", "a..b", "-a.org", "a b", "", "é.org",
     "300.1.1.1", "1.2.3", "0.0.0.0", "::", "224.0.0.1", "fe80::1%eth0", "a" * 64, "a." * 127 + "a", "a\n"],
)  # fmt: skip
def test_what_is_no_host_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(UserError, match=r"host .* is (neither|no address)"):
        keys.make(tmp_path / "keys", [host])


@given(st.lists(st.ip_addresses().map(str), min_size=1, max_size=3))
def test_addresses_come_back_as_they_were_given(addresses: list[str]) -> None:
    try:
        found = certificates.alternatives(addresses)
    except UserError:
        return
    assert [str(name.value) for name in found][: len(set(addresses))] == list(dict.fromkeys(addresses))


# ---- nodes ---------------------------------------------------------------------------------------


def test_flower_takes_the_keys_of_nodes(made: Path) -> None:
    """The functions of flwr that read a node's key, and the public key that is registered."""
    args = argparse.Namespace(
        auth_supernode_private_key=str(made / "nodes" / "gpu0.key"), auth_supernode_public_key=None
    )
    pair = _try_setup_client_authentication(args)
    assert pair is not None
    public = try_load_public_key(made / "enrolled" / "gpu0.pub")
    assert pair[1].public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) == public


def test_a_fingerprint_is_the_one_openssh_gives() -> None:
    assert key_files.fingerprint(PUBLIC) == key_files.fingerprint(PUBLIC + " a comment") == FINGERPRINT
    for other in ("", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp384 A!"):
        with pytest.raises(UserError, match="no public key in OpenSSH's format"):
            key_files.fingerprint(other)


@needs_ssh_keygen
def test_a_fingerprint_is_the_one_of_ssh_keygen(made: Path) -> None:
    told = subprocess.run(
        ["ssh-keygen", "-lf", str(made / "enrolled" / "gpu0.pub")], capture_output=True, text=True, check=True
    ).stdout.split()
    assert told[0] == "384"
    assert key_files.fingerprint(key_files.enrolled(made)["gpu0"]) == told[1]


def test_the_enrolment_list_is_what_was_copied_there(made: Path, tmp_path: Path) -> None:
    public = keys.make_node(tmp_path / "far", "gpu1")
    (made / "enrolled" / "gpu1.pub").write_text(public + " somebody@somewhere\n\n")
    assert list(key_files.enrolled(made)) == ["gpu0", "gpu1"]
    assert key_files.enrolled(made)["gpu1"] == " ".join(public.split()[:2])
    assert key_files.enrolled(made)["gpu0"] == key_checks.check_node(made / "nodes" / "gpu0.key", made / "ca.crt")


def ed25519_text() -> bytes:
    return ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.pub", b"", "no public ECDSA key"),
        ("a.pub", b"ecdsa-sha2-nistp384 AAAA", "no public ECDSA key"),
        ("a.pub", b"\xff\xfe", "no public ECDSA key"),
        pytest.param("a.pub", ed25519_text(), "no public ECDSA key", id="ed25519"),
        ("a.pub", b"-----BEGIN OPENSSH PRIVATE KEY-----", "is a private key: move it"),
        ("a.pub", b"x" * 100_000, "more than 65536 bytes"),
        ("notes.txt", b"hello", "no public key NAME.pub"),
        ("gpu0.pub~", b"", "no public key NAME.pub"),
        ("a b.pub", b"", "cannot be a node's name"),
    ],
)
def test_what_is_no_public_key_is_named(made: Path, name: str, content: bytes, told: str) -> None:
    (made / "enrolled" / name).write_bytes(content)
    with pytest.raises(UserError, match=told) as error:
        key_files.enrolled(made)
    assert name.removesuffix(".pub") in str(error.value)


def test_two_files_with_one_key_are_refused(made: Path) -> None:
    (made / "enrolled" / "again.pub").write_bytes((made / "enrolled" / "gpu0.pub").read_bytes().replace(b"gpu0", b"x"))
    with pytest.raises(UserError, match=r"nodes 'again' and 'gpu0' have the same key .* remove one"):
        key_files.enrolled(made)


def test_a_list_that_is_not_there_is_no_empty_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"enrolled' is not there: make keys with zofed keys init"):
        key_files.enrolled(tmp_path)


# ---- checks --------------------------------------------------------------------------------------


def test_new_keys_pass_the_checks(made: Path) -> None:
    key_checks.check_server(made, [*HOSTS, "Fed.Example.Org", "127.0.0.1"])
    (made / "ca.key").unlink()  # put away
    key_checks.check_server(made)


@pytest.mark.parametrize("name", ["ca.crt", "server.crt", "server.key"])
def test_a_server_misses_a_file(made: Path, name: str) -> None:
    (made / name).unlink()
    with pytest.raises(UserError, match=rf"{name}' is not there: make keys with zofed keys init"):
        key_checks.check_server(made)


@pytest.mark.parametrize("name", ["ca.crt", "server.crt", "server.key"])
def test_a_file_of_a_server_is_cut(made: Path, name: str) -> None:
    (made / name).write_bytes((made / name).read_bytes()[:150])
    with pytest.raises(UserError, match=rf"{name}' is no "):
        key_checks.check_server(made)


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o666])
@pytest.mark.parametrize("name", ["server.key", "ca.key"])
def test_a_key_that_others_can_read_is_refused(made: Path, name: str, bits: int) -> None:
    (made / name).chmod(bits)
    with pytest.raises(UserError, match=rf"{name}' has mode {bits:04o}, .*: chmod 600 "):
        key_checks.check_server(made)


def test_a_certificate_without_the_hosts_name_is_refused(made: Path) -> None:
    with pytest.raises(UserError, match=r"is not for 'other.example' but for fed.example.org, .*zofed keys renew"):
        key_checks.check_server(made, ["fed.example.org", "other.example"])


def test_a_certificate_of_another_ca_is_refused(made: Path, tmp_path: Path) -> None:
    keys.make(tmp_path / "other", HOSTS)
    (made / "ca.crt").write_bytes((tmp_path / "other" / "ca.crt").read_bytes())
    with pytest.raises(UserError, match=r"server.crt' was not signed by .*ca.crt'"):
        key_checks.check_server(made)


def test_a_certificate_of_another_key_is_refused(made: Path, tmp_path: Path) -> None:
    keys.make(tmp_path / "other", HOSTS)
    (made / "server.key").write_bytes((tmp_path / "other" / "server.key").read_bytes())
    with pytest.raises(UserError, match=r"server.crt' belongs to another key than .*server.key'"):
        key_checks.check_server(made)


def test_times_outside_are_told_with_both_dates(made: Path) -> None:
    today = datetime.now(UTC)
    key_checks.check_server(made, now=today + timedelta(days=364))
    for now, told in (
        (today + timedelta(days=366), "server.crt' expired "),
        (today + timedelta(days=3651), "ca.crt' expired "),
        (today - timedelta(hours=2), "ca.crt' is valid from .* this machine says it is .*: set its clock right"),
    ):
        with pytest.raises(UserError, match=told):
            key_checks.check_server(made, now=now)


@pytest.fixture
def node(made: Path) -> tuple[Path, Path]:
    """A node's private key and its copy of the CA's certificate."""
    return made / "nodes" / "gpu0.key", made / "ca.crt"


def test_a_node_misses_a_file(node: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.key' is not there: make one on this node with zofed keys node"):
        key_checks.check_node(tmp_path / "x.key", node[1])
    with pytest.raises(UserError, match=r"x.crt' is not there: copy ca.crt"):
        key_checks.check_node(node[0], tmp_path / "x.crt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_entered_is_told(node: tuple[Path, Path], made: Path) -> None:
    made.chmod(0)
    try:
        for check in (
            lambda: key_checks.check_node(*node),
            lambda: key_checks.check_server(made),
            lambda: key_files.enrolled(made),
        ):
            with pytest.raises(UserError, match=r"cannot be read \(Permission denied\): check its owner"):
                check()
    finally:
        made.chmod(0o700)


def test_a_nodes_key_that_others_can_read_is_refused(node: tuple[Path, Path]) -> None:
    node[0].chmod(0o644)
    with pytest.raises(UserError, match=r"gpu0.key' has mode 0644, .*: chmod 600 "):
        key_checks.check_node(*node)


def other_keys() -> list[tuple[bytes, str]]:
    ecdsa = ec.generate_private_key(ec.SECP384R1())
    edwards = ed25519.Ed25519PrivateKey.generate()
    return [
        (ecdsa.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "not in OpenSSH's format"),
        (edwards.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), "no ECDSA key"),
        (ecdsa.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH), "no private key"),
        (b"", "no private key"),
        (ecdsa.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())[:200], "no private key"),
    ]


@pytest.mark.parametrize("case", range(5))
def test_keys_that_flower_would_not_take_are_refused(node: tuple[Path, Path], case: int) -> None:
    content, told = other_keys()[case]
    node[0].write_bytes(content)
    with pytest.raises(UserError, match=rf"{told}.*: make one with zofed keys node"):
        key_checks.check_node(*node)


@needs_ssh_keygen
def test_a_key_with_a_passphrase_is_refused(node: tuple[Path, Path]) -> None:
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", str(node[0])], check=True, capture_output=True)
    with pytest.raises(UserError, match=r"has a passphrase, .*: make one with zofed keys node"):
        key_checks.check_node(*node)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP521R1()])
def test_other_curves_that_flower_takes_pass(node: tuple[Path, Path], curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    node[0].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    (node[1].parent / "enrolled" / "gpu0.pub").write_text(key_checks.check_node(*node))
    assert try_load_public_key(node[1].parent / "enrolled" / "gpu0.pub")


def test_a_nodes_ca_must_be_one_and_valid(node: tuple[Path, Path], made: Path) -> None:
    with pytest.raises(UserError, match=r"ca.crt' expired .*: ask whoever runs the server"):
        key_checks.check_node(*node, now=datetime.now(UTC) + timedelta(days=3651))
    with pytest.raises(UserError, match=r"server.crt' is the certificate of a server, not of a CA"):
        key_checks.check_node(node[0], made / "server.crt")
    with pytest.raises(UserError, match=r"gpu0.pub' is no certificate"):
        key_checks.check_node(node[0], made / "enrolled" / "gpu0.pub")


# ---- damage and its remedies ---------------------------------------------------------------------


def pem_of(key: ec.EllipticCurvePrivateKey, password: bytes) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, serialization.BestAvailableEncryption(password))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "one bit": lambda whole: (
        whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
    ),
    "UTF-16": lambda whole: whole.decode().encode("utf-16"),
    "a mark": lambda whole: b"\xef\xbb\xbf" + whole,
    "binary": lambda whole: b"\x30\x82\x00\xff" * 50,
    "another kind": lambda whole: PUBLIC.encode(),
    "encrypted": lambda whole: pem_of(ec.generate_private_key(ec.SECP256R1()), b"secret"),
    "another curve": lambda whole: ec.generate_private_key(ec.SECP256K1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    ),
}


def refusal_of(check: Callable[[], object], path: Path) -> str:
    """The message of a check that must be refused and name the file."""
    with pytest.raises(UserError) as caught:
        check()
    assert repr(str(path)) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_with_a_remedy_that_mends_it(made: Path, tmp_path: Path, damage: str) -> None:
    whole = {name: (made / name).read_bytes() for name in ("ca.crt", "ca.key", "server.crt", "server.key")}

    def damaged(name: str) -> Path:
        (made / name).write_bytes(DAMAGE[damage](whole[name]))
        return made / name

    told = refusal_of(lambda: key_checks.check_server(made), damaged("server.key"))
    assert told.endswith("zofed keys renew")
    keys.renew(made)
    key_checks.check_server(made, HOSTS)

    told = refusal_of(lambda: key_checks.check_server(made), damaged("server.crt"))
    assert told.endswith("zofed keys renew and every name and address by which nodes reach the server")
    assert refusal_of(lambda: keys.renew(made), made / "server.crt") == told
    keys.renew(made, HOSTS)
    key_checks.check_server(made, HOSTS)

    for name, check in (("ca.key", lambda: keys.renew(made)), ("ca.crt", lambda: key_checks.check_server(made))):
        told = refusal_of(check, damaged(name))
        assert told.endswith("bring it back from a copy, or make new keys with zofed keys init and another --out")
        (made / name).write_bytes(whole[name])
        key_checks.check_server(made, HOSTS)
    keys.make(tmp_path / "another", HOSTS)
    key_checks.check_server(tmp_path / "another", HOSTS)

    node = made / "nodes" / "gpu0.key"
    assert "copy ca.crt from the server's" in refusal_of(
        lambda: key_checks.check_node(node, made / "ca.crt"), damaged("ca.crt")
    )
    shutil.copy(tmp_path / "another" / "ca.crt", made / "ca.crt")
    key_checks.check_node(node, made / "ca.crt")
    if damage != "a mark":  # which OpenSSH's format allows
        node.write_bytes(DAMAGE[damage](node.read_bytes()))
        assert refusal_of(lambda: key_checks.check_node(node, made / "ca.crt"), node).endswith("zofed keys node NAME")
        node.unlink()
        keys.make_node(node.parent, "gpu0")
        key_checks.check_node(node, made / "ca.crt")


def test_what_is_no_file_is_told_and_not_waited_for(made: Path) -> None:
    for name in ("ca.crt", "server.crt", "server.key"):
        whole = (made / name).read_bytes()
        for put in (os.mkdir, os.mkfifo, lambda path: os.symlink(path.name, path)):
            (made / name).unlink()
            put(made / name)
            refusal_of(lambda: key_checks.check_server(made), made / name)
            if name != "server.key":
                refusal_of(lambda name=name: key_files.certificate(made / name), made / name)
            os.rmdir(made / name) if (made / name).is_dir() else (made / name).unlink()
            (made / name).write_bytes(whole)
            (made / name).chmod(0o600)
    key_checks.check_server(made)


def test_a_ca_of_another_maker_signs_too(made: Path) -> None:
    key = serialization.load_pem_private_key((made / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    name, now = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ours")]), datetime.now(UTC)
    plain = certificates._builder(name, name, key.public_key(), now, 400)
    authority = plain.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    (made / "ca.crt").write_bytes(authority.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    keys.renew(made, HOSTS, days=30)
    key_checks.check_server(made, HOSTS)


# ---- renewing ------------------------------------------------------------------------------------


def test_a_renewed_certificate_is_believed_by_the_same_nodes(made: Path, tmp_path: Path) -> None:
    old_ca, old_key = (made / "ca.crt").read_bytes(), (made / "server.key").read_bytes()
    keys.renew(made, ["new.example.org"], days=30)
    assert (made / "ca.crt").read_bytes() == old_ca and (made / "server.key").read_bytes() != old_key
    assert mode(made / "server.key") == 0o600
    key_checks.check_server(made, ["new.example.org", "localhost"])
    assert handshake(made, made / "ca.crt", "new.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made, made / "ca.crt", "fed.example.org")
    assert certificates.days_left(key_files.certificate(made / "server.crt")) == 29
    assert sorted(path.name for path in made.iterdir()) == [
        "ca.crt", "ca.key", "enrolled", "nodes", "server.crt", "server.key",
    ]  # fmt: skip


def test_without_hosts_the_names_stay(made: Path) -> None:
    keys.renew(made)
    key_checks.check_server(made, [*HOSTS, *certificates.ALWAYS])


def test_renewing_needs_the_ca(made: Path, tmp_path: Path) -> None:
    keys.make(tmp_path / "other", HOSTS)
    with pytest.raises(UserError, match=r"days = 3651: the CA ends .*; give --days 36\d\d or fewer"):
        keys.renew(made, days=3651)
    (made / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(UserError, match=r"ca.crt' belongs to another key than .*ca.key'"):
        keys.renew(made)
    (made / "ca.key").unlink()
    with pytest.raises(UserError, match=r"ca.key' is not there: only the CA can sign"):
        keys.renew(made)
    key_checks.check_server(made)  # what was there still stands


# ---- the commands --------------------------------------------------------------------------------

Command = Callable[..., tuple[int, str, str]]


def test_a_person_makes_keys_and_sees_them(zofed_command: Command, tmp_path: Path) -> None:
    out = tmp_path / "keys"
    status, told, _ = zofed_command("keys", "init", "fed.example.org", "--out", out, "--node", "gpu0", "--days", 90)
    assert status == 0
    assert f"rm {out}/nodes/gpu0.key" in told and f"zofed superlink --keys {out}" in told
    key_checks.check_server(out, ["fed.example.org"])
    status, told, _ = zofed_command("keys", "node", "gpu1", "--out", tmp_path)
    mark = key_files.fingerprint((tmp_path / "gpu1.pub").read_text())
    assert status == 0 and mark in told and "keys/enrolled/" in told
    (out / "enrolled" / "gpu1.pub").write_bytes((tmp_path / "gpu1.pub").read_bytes())
    status, told, _ = zofed_command("keys", "show", "--keys", out)
    assert status == 0 and mark in told and " 89 " in told and "fed.example.org" in told
    status, told, _ = zofed_command("keys", "renew", "other.example", "--keys", out)
    assert status == 0 and "other.example, localhost" in told
    key_checks.check_server(out, ["other.example"])


def test_an_expired_certificate_is_shown_as_such(
    zofed_command: Command, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expired(made, monkeypatch)
    status, told, _ = zofed_command("keys", "show", "--keys", made)
    assert status == 0 and "expired" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["init", "a:1", "--out", "OUT"], "neither a DNS name nor an IP address"),
        (["init", "a", "--out", "OUT", "--node", "../a"], "cannot be a node's name"),
        (["init", "a", "--out", "MADE"], "never overwritten"),
        (["init", "a", "--days", "0"], "--days"),
        (["init"], "HOSTS"),
        (["renew", "--keys", "OUT"], "is not there"),
        (["show", "--keys", "OUT"], "cannot be read (No such file or directory)"),
    ],
)
def test_a_mistake_is_one_line(
    zofed_command: Command, made: Path, tmp_path: Path, arguments: Sequence[str], told: str
) -> None:
    places = {"OUT": str(tmp_path / "out"), "MADE": str(made)}
    status, _, errors = zofed_command("keys", *(places.get(argument, argument) for argument in arguments))
    assert status == 2 and told in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
