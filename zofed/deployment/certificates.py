"""X.509 certificates of a CA and of its server: issued, and what they say. No files here."""

import ipaddress
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from zofed.base.errors import UserError

ALWAYS = ("localhost", "127.0.0.1", "::1")  # what the server's own commands, and a proxy on it, connect to
CA_DAYS = 3650
SERVER_DAYS = 365
EARLIER = timedelta(hours=1)  # certificates begin so much before now, for machines whose clocks are behind

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


# ---- issuing -------------------------------------------------------------------------------------


def authority(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    """A CA's certificate for `key`, signed by itself; it lasts CA_DAYS from `now`."""
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


def issued(
    authority: x509.Certificate,
    authority_key: PrivateKey,
    alternatives: list[x509.GeneralName],
    now: datetime,
    days: int,
) -> tuple[bytes, bytes]:
    """A server's new key and certificate, PEM. It has all that Python 3.13's strict check wants.

    alternatives: the names and addresses it is for. days: how long it lasts, from `now`.
    """
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
    return pem(key), issued.public_bytes(Encoding.PEM)


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


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key in PEM format, without a passphrase."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def alternatives(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """What a certificate for these hosts says it is for, each once, those of ALWAYS last.

    Raises UserError without a host, and for one that is neither a DNS name nor an address.
    """
    if not hosts:
        raise UserError("no host: name every name and address by which nodes reach the server")
    return list(dict.fromkeys(general_name(host) for host in (*hosts, *ALWAYS)))


def general_name(host: str) -> x509.GeneralName:
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


# ---- what they say -------------------------------------------------------------------------------


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


def is_authority(found: x509.Certificate) -> bool:
    """Whether a certificate is a CA's, which may sign others."""
    try:
        return found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def date(moment: datetime) -> str:
    """A moment to the minute, for messages; it must be in UTC."""
    return f"{moment:%Y-%m-%d %H:%M} UTC"
