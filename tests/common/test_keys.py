from __future__ import annotations

import datetime as dt
import ipaddress
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from rin.common import keys
from rin.common.errors import ConfigError, StateError


@pytest.fixture(scope="module")
def authority() -> tuple[bytes, bytes]:
    return keys.make_ca("rin test")


def test_the_ca_signs_certificates_and_nothing_else(authority: tuple[bytes, bytes]) -> None:
    certificate = x509.load_pem_x509_certificate(authority[0])
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert basic.critical and basic.value.ca and basic.value.path_length == 0
    assert usage.critical and usage.value.key_cert_sign and usage.value.crl_sign
    assert 3650 <= keys.days_left(authority[0]) <= 3653


def test_the_server_certificate_names_loopback_and_the_public_name(authority: tuple[bytes, bytes]) -> None:
    made, _ = keys.make_server_certificate(*authority, ["rin.example.org", "192.0.2.7", "localhost"])
    certificate = x509.load_pem_x509_certificate(made)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "rin.example.org"]
    addresses = [ipaddress.ip_address(each) for each in ("127.0.0.1", "192.0.2.7")]
    assert names.get_values_for_type(x509.IPAddress) == addresses
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == dt.timedelta(days=398)
    assert 396 <= keys.days_left(made) <= 398
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_openssl_verifies_the_chain(authority: tuple[bytes, bytes], tmp_path: Path) -> None:
    made, _ = keys.make_server_certificate(*authority, [])
    (tmp_path / "ca").write_bytes(authority[0])
    (tmp_path / "server").write_bytes(made)
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", "ca", "server"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_tls_handshake_trusts_this_ca_only(authority: tuple[bytes, bytes], tmp_path: Path) -> None:
    made, key = keys.make_server_certificate(*authority, [])
    for name, data in (("ca", authority[0]), ("other", keys.make_ca("other")[0]), ("crt", made), ("key", key)):
        (tmp_path / name).write_bytes(data)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    assert _handshake(server_side, keys.client_context(tmp_path / "ca"))
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(server_side, keys.client_context(tmp_path / "other"))


def _handshake(server_side: ssl.SSLContext, client_side: ssl.SSLContext) -> bool:
    """A handshake in memory."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(up, down, server_side=True)
    client = client_side.wrap_bio(down, up, server_hostname="localhost")
    done = set()
    for _ in range(10):
        for side in (client, server):
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                pass
    return len(done) == 2


def test_a_node_key_is_flowers_kind_and_proves_possession() -> None:
    private = keys.make_node_key()
    public = keys.node_public(private)
    assert private.startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    assert public.startswith("ecdsa-sha2-nistp384 ")
    proof = keys.node_sign(private, b"statement")
    assert keys.node_verify(public, b"statement", proof)
    assert not keys.node_verify(public, b"Statement", proof)
    assert not keys.node_verify(keys.node_public(keys.make_node_key()), b"statement", proof)


@pytest.mark.parametrize("public", ["", "ecdsa-sha2-nistp384 AAAA", "no key", "ssh-rsa AAAAB3NzaC1yc2E="])
def test_a_malformed_node_key_verifies_nothing(public: str) -> None:
    assert not keys.node_verify(public, b"statement", b"signature")


def test_signatures_are_bound_to_key_and_data(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"
    keys.save_private(path, keys.make_signing_key())
    key = keys.load_signing_key(path)
    public, signature = keys.signing_public(key), keys.sign(key, b"data")
    assert len(signature) == 64 and len(public) == 64
    assert keys.verify(public, b"data", signature)
    assert not keys.verify(public, b"other", signature)
    assert not keys.verify("00" * 32, b"data", signature)
    assert not keys.verify("xx", b"data", signature)
    assert not keys.verify(public, b"data", b"")


def test_private_keys_are_0600_and_refused_when_open(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "k"
    keys.save_private(path, b"secret")
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert keys.load_private(path) == b"secret"
    path.chmod(0o640)
    with pytest.raises(StateError, match="open to other accounts"):
        keys.load_private(path)
    (tmp_path / "link").symlink_to(path)
    for missing in (tmp_path / "none", tmp_path / "link"):
        with pytest.raises(StateError, match="missing"):
            keys.load_private(missing)


def test_another_kind_of_key_is_named(tmp_path: Path, authority: tuple[bytes, bytes]) -> None:
    keys.save_private(tmp_path / "k", authority[1])
    with pytest.raises(StateError, match="no Ed25519 key"):
        keys.load_signing_key(tmp_path / "k")


def test_days_left_of_no_certificate() -> None:
    with pytest.raises(ConfigError):
        keys.days_left(b"no certificate")


def test_fingerprints_are_compared_as_people_type_them() -> None:
    shown = keys.fingerprint(b"data")
    assert shown == "3a6e-b079-0f39-ac87-c94f-3856-b2dd-2c5d"  # sha256sum of "data"
    for typed in (shown, shown.upper(), shown.replace("-", ""), shown.replace("-", " "), f" {shown} "):
        assert keys.same_fingerprint(typed, b"data")
    for typed in ("", shown[:-1], shown + "0", keys.fingerprint(b"Data")):
        assert not keys.same_fingerprint(typed, b"data")


@given(st.binary(max_size=200))
def test_encode_round_trip(data: bytes) -> None:
    assert keys.decode(keys.encode(data)) == data


@given(st.text(max_size=20))
def test_decode_takes_only_what_encode_writes(text: str) -> None:
    data = keys.decode(text)
    assert data is None or keys.encode(data) == text


def test_the_server_key_is_not_the_cas(authority: tuple[bytes, bytes]) -> None:
    _, key = keys.make_server_certificate(*authority, [])
    both = [serialization.load_pem_private_key(each, None) for each in (key, authority[1])]
    assert both[0].private_numbers() != both[1].private_numbers()  # type: ignore[union-attr]
