"""Keys and certificates: the consortium's CA and server certificate, a site's node key and signing key."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import ipaddress
import os
import ssl
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from rin.common.errors import ConfigError, StateError
from rin.common.files import write_atomic

CA_DAYS: Final = 3652
SERVER_DAYS: Final = 398  # the longest life that TLS clients accept for a server certificate
WARN_DAYS: Final = 30  # both ends warn when fewer are left
_BACKDATE: Final = dt.timedelta(hours=1)  # a site whose clock is slow may join at once


def make_ca(name: str) -> tuple[bytes, bytes]:
    """A self-signed certificate authority, EC P-384, for ten years: (certificate PEM, key PEM)."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _builder(subject, subject, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key)


def make_server_certificate(ca: bytes, ca_key: bytes, names: Iterable[str]) -> tuple[bytes, bytes]:
    """A server certificate that `ca` signs, EC P-384, for 398 days: (certificate PEM, key PEM).

    Args:
        ca, ca_key: PEM, of `make_ca`.
        names: DNS names and IP addresses beside localhost and 127.0.0.1, which the coordinator's own children use.
    """
    authority = x509.load_pem_x509_certificate(ca)
    signer = _load_ec(ca_key)
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "rin coordinator")])
    alternatives = [_general_name(name) for name in dict.fromkeys(["localhost", "127.0.0.1", *names])]
    certificate = (
        _builder(subject, authority.subject, key.public_key(), SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key)


def days_left(certificate: bytes) -> int:
    """Whole days until the first certificate of the PEM text expires; negative when it has.

    Raises:
        ConfigError: no certificate.
    """
    try:
        end = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
    except ValueError:
        raise ConfigError("not a PEM certificate", step="take the CA file of the invite again") from None
    return (end - dt.datetime.now(dt.UTC)).days


def client_context(ca: Path) -> ssl.SSLContext:
    """A TLS context that trusts the certificates in `ca` (PEM, a bundle is fine) and nothing else.

    Raises:
        StateError: missing, or no certificate.
    """
    try:
        return ssl.create_default_context(cafile=str(ca))
    except FileNotFoundError:
        raise StateError(f"{ca.name} is missing", step="join the consortium first: rin-client join INVITE") from None
    except ssl.SSLError:
        raise StateError(f"{ca.name} holds no certificate", step="join again with the invite") from None


# --- a site's two keys ------------------------------------------------------------------------------------------


def make_node_key() -> bytes:
    """A private key for Flower's node authentication: EC P-384, OpenSSH text."""
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def node_public(private: bytes) -> str:
    """The public half of a node key as one OpenSSH line."""
    encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return _load_node(private).public_key().public_bytes(encoding, form).decode()


def node_sign(private: bytes, data: bytes) -> bytes:
    """ECDSA with SHA-384, DER: proof that the sender of a join file holds the node key."""
    return _load_node(private).sign(data, ec.ECDSA(hashes.SHA384()))


def node_verify(public: str, data: bytes, signature: bytes) -> bool:
    """Whether `signature` is `node_sign`'s over `data`; False for a key that is no EC P-384 OpenSSH line."""
    try:
        key = serialization.load_ssh_public_key(public.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
            return False
        key.verify(signature, data, ec.ECDSA(hashes.SHA384()))
    except (ValueError, UnsupportedAlgorithm, InvalidSignature):
        return False
    return True


def make_signing_key() -> bytes:
    """A private key for manifests: Ed25519, PEM."""
    return _key_pem(ed25519.Ed25519PrivateKey.generate())


def load_signing_key(path: Path) -> ed25519.Ed25519PrivateKey:
    """The key that `make_signing_key` made, from `path`.

    Raises:
        StateError: missing, readable for others, or another kind of key.
    """
    key = serialization.load_pem_private_key(load_private(path), password=None)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise StateError(f"{path.name} is no Ed25519 key", step="make a new one: rin-client join --renew")
    return key


def signing_public(key: ed25519.Ed25519PrivateKey) -> str:
    """The public half of a signing key: 64 hex digits."""
    raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
    return key.public_key().public_bytes(*raw).hex()


def sign(key: ed25519.Ed25519PrivateKey, data: bytes) -> bytes:
    """Ed25519 (RFC 8032): 64 bytes."""
    return key.sign(data)


def verify(public: str, data: bytes, signature: bytes) -> bool:
    """Whether `signature` is that of the key `public` (64 hex digits) over `data`."""
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, data)
    except (ValueError, InvalidSignature):
        return False
    return True


# --- files and fingerprints -------------------------------------------------------------------------------------


def save_private(path: Path, data: bytes) -> None:
    """Write a private key: mode 0600, atomically, in a directory of mode 0700 if it has to be made."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(path, data, mode=0o600)


def load_private(path: Path) -> bytes:
    """The bytes of a private key file.

    Raises:
        StateError: missing, a link, or readable for other accounts.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        raise StateError(f"the key {path.name} is missing", step=f"put it back at {path}") from None
    with os.fdopen(fd, "rb") as file:
        if stat.S_IMODE(os.fstat(fd).st_mode) & 0o077:
            raise StateError(f"the key {path.name} is open to other accounts", step=f"chmod 600 {path}")
        return file.read()


def sha256(data: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(data: bytes) -> str:
    """The first 128 bits of the SHA-256 of `data` as eight groups of four hex digits, to be read over the telephone.

    A forger needs a second preimage, so half of the hash is as good as the whole and half as long to read.
    """
    digits = sha256(data)[:32]
    return "-".join(digits[at : at + 4] for at in range(0, 32, 4))


def same_fingerprint(given: str, data: bytes) -> bool:
    """Whether a person gave the fingerprint of `data`; case, spaces, colons and dashes do not matter."""
    return given.lower().translate(str.maketrans("", "", " -:\t\n")) == fingerprint(data).replace("-", "")


def encode(data: bytes) -> str:
    """base64url with padding, as headers and JSON carry bytes."""
    return base64.urlsafe_b64encode(data).decode()


def decode(text: str) -> bytes | None:
    """Inverse of `encode`; None for anything that `encode` does not write."""
    try:
        data = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
    except ValueError:
        return None
    return data if encode(data) == text else None


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now - _BACKDATE + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load_ec(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateError("ca.key is no EC key", step="put the right ca.key back")
    return key


def _load_node(private: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_ssh_private_key(private, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateError("node.key is no EC key", step="make a new one: rin-client join --renew")
    return key
