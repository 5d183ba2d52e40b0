"""The carrier over real TLS: resumed, refused, retried, and its words for a link that does not hold."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from rin.common import keys
from rin.common.errors import RefusedError, RinError, StateError, TransferError
from rin.common.layout import Layout
from rin.common.transfer import HttpCarrier, _Hash, content_range, explain, make_client, parse_content_range
from rin.server import receipts, tickets
from tests.small_run import SmallRun, Update, free_port


@pytest.fixture
def carrier(small: SmallRun) -> Iterator[HttpCarrier]:
    with HttpCarrier(small.address, small.ca, tries=2) as carrier:
        yield carrier


def send(carrier: HttpCarrier, update: Update) -> None:
    carrier.send(update.number, update.site, update.ticket, update.path, update.manifest.to_bytes(), update.signature)


# --- down -------------------------------------------------------------------------------------------------------


def test_weights_arrive_whole_under_their_name(small: SmallRun, carrier: HttpCarrier, tmp_path: Path) -> None:
    target = tmp_path / "inbox" / small.base
    carrier.fetch(small.base, small.ticket(small.next_round(), "siteA"), target)
    assert target.read_bytes() == small.content(b"global")[0]
    assert [path.name for path in target.parent.iterdir()] == [small.base]
    carrier.fetch(small.base, "no ticket: it is there already", target)


@pytest.mark.parametrize("arrived", [1, 7, 8, 100, 3_000_000, -1, 0])
def test_a_cut_download_goes_on(small: SmallRun, carrier: HttpCarrier, tmp_path: Path, arrived: int) -> None:
    content, _ = small.content(b"global")
    part = tmp_path / f".{small.base}.part"
    part.write_bytes(content[:arrived] if arrived else content)
    carrier.fetch(small.base, small.ticket(small.next_round(), "siteA"), tmp_path / small.base)
    assert (tmp_path / small.base).read_bytes() == content and not part.exists()


def test_a_damaged_part_never_becomes_weights(small: SmallRun, carrier: HttpCarrier, tmp_path: Path) -> None:
    content, _ = small.content(b"global")
    (tmp_path / f".{small.base}.part").write_bytes(content[:500_000] + b"\x00" * 500_000)
    carrier.fetch(small.base, small.ticket(small.next_round(), "siteA"), tmp_path / small.base)  # the second try, anew
    assert (tmp_path / small.base).read_bytes() == content


def test_weights_of_another_digest_are_refused(small: SmallRun, carrier: HttpCarrier, tmp_path: Path) -> None:
    update = small.update("siteA")
    content, _ = small.content(b"altered on the coordinator's disk")
    small.run.weights_file(small.base).write_bytes(content)
    try:
        with pytest.raises(TransferError) as failed:
            carrier.fetch(small.base, update.ticket, tmp_path / small.base)
    finally:
        small.publish(b"global")
    assert failed.value.code == "bad-weights" and not failed.value.retry
    assert not (tmp_path / small.base).exists()


def test_a_part_that_is_too_long_is_dropped(small: SmallRun, carrier: HttpCarrier, tmp_path: Path) -> None:
    content, _ = small.content(b"global")
    (tmp_path / f".{small.base}.part").write_bytes(content + b"more")
    carrier.fetch(small.base, small.ticket(small.next_round(), "siteA"), tmp_path / small.base)
    assert (tmp_path / small.base).read_bytes() == content


def test_a_link_in_the_place_of_a_part_is_not_followed(small: SmallRun, carrier: HttpCarrier, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"")
    (tmp_path / f".{small.base}.part").symlink_to(victim)
    with pytest.raises(OSError):
        carrier.fetch(small.base, small.ticket(small.next_round(), "siteA"), tmp_path / small.base)
    assert victim.read_bytes() == b""


@pytest.mark.parametrize("state", ["stranger", "late", "duplicate", "other weights"])
def test_refusals_come_as_codes(small: SmallRun, carrier: HttpCarrier, tmp_path: Path, state: str) -> None:
    update = small.update("siteA")
    digest, ticket = small.base, update.ticket
    if state == "late":
        tickets.close(small.run, update.number)
    elif state == "duplicate":
        send(carrier, update)
    elif state == "stranger":
        ticket = "1." + "A" * 43
    else:
        digest = "0" * 64
    code = {"stranger": "update-stranger", "late": "update-late", "duplicate": "update-duplicate"}
    with pytest.raises(RefusedError) as refused:
        carrier.fetch(digest, ticket, tmp_path / "w")
    assert refused.value.code == code.get(state, "bad-weights")


# --- up ---------------------------------------------------------------------------------------------------------


def test_an_update_arrives_and_may_be_sent_again(small: SmallRun, carrier: HttpCarrier) -> None:
    update = small.update("siteB")
    send(carrier, update)
    send(carrier, update)
    found = receipts.receipt(small.run, update.number, "siteB")
    assert found and found.path.read_bytes() == update.path.read_bytes()


def test_a_file_that_changed_is_never_sent_to_its_end(small: SmallRun, carrier: HttpCarrier) -> None:
    update = small.update("siteA")
    content = bytearray(update.path.read_bytes())
    content[-1] ^= 1
    update.path.write_bytes(content)
    with pytest.raises(TransferError) as failed:
        send(carrier, update)
    assert failed.value.code == "update-digest" and not failed.value.retry
    assert receipts.receipts(small.run, update.number) == []


def test_the_outbox_is_read_without_following_links(small: SmallRun, carrier: HttpCarrier, tmp_path: Path) -> None:
    update = small.update("siteA")
    link = tmp_path / "link"
    link.symlink_to(update.path)
    for path in (link, tmp_path, tmp_path / "missing"):
        with pytest.raises(TransferError):
            send(carrier, replace(update, path=path))


def test_a_bad_signature_is_refused(small: SmallRun, carrier: HttpCarrier) -> None:
    update = small.update("siteA", signer="siteB")
    with pytest.raises(RefusedError) as refused:
        send(carrier, update)
    assert refused.value.code == "update-signature"


def test_a_gateway_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    small = SmallRun(tmp_path)
    update = small.update("siteA")
    failures: list[RinError] = []

    def work() -> None:
        try:
            with HttpCarrier(small.address, small.ca) as carrier:
                carrier.fetch(small.base, update.ticket, tmp_path / "weights")
                send(carrier, update)
        except RinError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    with small.gateway():
        thread.join(60)
        assert not failures and receipts.receipt(small.run, update.number, "siteA")


class Relay:
    """A TCP relay that cuts every connection after `limit` bytes from the site: a link that does not hold."""

    def __init__(self, port: int, limit: int) -> None:
        self._port, self._limit, self.cuts = port, limit, 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        """One connection after the other; the answers are pumped beside."""
        while True:
            near, _ = self._server.accept()
            with near, socket.create_connection(("127.0.0.1", self._port)) as far:
                back = threading.Thread(target=self._pump, args=(far, near, 1 << 60))
                back.start()
                self.cuts += self._pump(near, far, self._limit)
                back.join()
            if self._limit == 0:
                return

    def _pump(self, source: socket.socket, target: socket.socket, left: int) -> bool:
        """Whether the limit was reached."""
        with contextlib.suppress(OSError):
            while left > 0 and (block := source.recv(min(65536, left))):
                target.sendall(block)
                left -= len(block)
        for side in (source, target):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
        return left <= 0

    def close(self) -> None:
        self._limit = 0
        socket.create_connection(("127.0.0.1", self.port)).close()
        self._thread.join()
        self._server.close()


def test_an_upload_survives_a_link_that_breaks_again_and_again(small: SmallRun) -> None:
    update = small.update("siteC")
    relay = Relay(small.port, 2_500_000)
    try:
        with HttpCarrier(f"https://localhost:{relay.port}", small.ca, tries=3) as carrier:
            send(carrier, update)
    finally:
        relay.close()
    found = receipts.receipt(small.run, update.number, "siteC")
    assert found and found.path.read_bytes() == update.path.read_bytes()
    assert relay.cuts >= 2


# --- words for a link that does not hold ------------------------------------------------------------------------


def probe(address: str, ca: Path) -> int:
    """Status of GET /health, or the error in words."""
    with make_client(address, ca) as client:
        try:
            return client.get("/health").status_code
        except httpx.HTTPError as error:
            raise explain(error) from None


def test_a_link_that_does_not_hold_is_named(small: SmallRun, tmp_path: Path) -> None:
    other, _ = keys.make_ca("another")
    (tmp_path / "ca.crt").write_bytes(other)
    with pytest.raises(TransferError, match="another CA") as failed:
        probe(small.address, tmp_path / "ca.crt")
    assert not failed.value.retry and failed.value.step
    with pytest.raises(TransferError, match="nothing answers") as failed:
        probe(f"https://localhost:{free_port()}", small.ca)
    assert failed.value.retry and failed.value.step
    with pytest.raises(StateError, match="missing"):
        probe(small.address, tmp_path / "none")
    (tmp_path / "ca.crt").write_text("no certificate")
    with pytest.raises(StateError, match="no certificate"):
        probe(small.address, tmp_path / "ca.crt")
    with small.upstream():
        assert probe(small.address, small.ca) == 200


def test_a_wrong_ca_is_not_tried_again(small: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(keys.make_ca("another")[0])
    began = time.monotonic()
    with HttpCarrier(small.address, tmp_path / "ca.crt") as carrier, pytest.raises(TransferError, match="another CA"):
        carrier.fetch(small.base, "1." + "A" * 43, tmp_path / "w")
    assert time.monotonic() - began < 2


def _serve_once(context: ssl.SSLContext | None, answer: bytes) -> int:
    server = socket.create_server(("127.0.0.1", 0))

    def work() -> None:
        link, _ = server.accept()
        try:
            link = context.wrap_socket(link, server_side=True) if context else link
            link.recv(65536)
            link.sendall(answer)
        except OSError:
            pass
        link.close()
        server.close()

    threading.Thread(target=work, daemon=True).start()
    return server.getsockname()[1]


def _certificate(folder: Path, begin: dt.datetime, end: dt.datetime, name: str) -> tuple[Path, ssl.SSLContext]:
    """A CA, and a context for a server whose certificate is for `name` and valid from `begin` to `end`."""
    ca, ca_key = keys.make_ca("test")
    made, key = keys.make_server_certificate(ca, ca_key, [])
    like = x509.load_pem_x509_certificate(made)
    signer = serialization.load_pem_private_key(ca_key, None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    certificate = (
        x509.CertificateBuilder()
        .issuer_name(like.issuer)
        .subject_name(like.subject)
        .public_key(like.public_key())
        .serial_number(like.serial_number)
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )
    (folder / "ca").write_bytes(ca)
    (folder / "crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key").write_bytes(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "crt", folder / "key")
    return folder / "ca", context


@pytest.mark.parametrize(
    "days,name,words",
    [
        ((-9, -2), "localhost", "has expired"),
        ((2, 9), "localhost", "not valid yet"),
        ((-1, 9), "elsewhere.example", "another name"),
    ],
)
def test_a_certificate_that_does_not_hold_is_named(
    tmp_path: Path, days: tuple[int, int], name: str, words: str
) -> None:
    now = dt.datetime.now(dt.UTC)
    begin, end = (now + dt.timedelta(days=each) for each in days)
    ca, context = _certificate(tmp_path, begin, end, name)
    with pytest.raises(TransferError, match=words) as failed:
        probe(f"https://localhost:{_serve_once(context, b'')}", ca)
    assert failed.value.step and not failed.value.retry


def test_a_port_without_tls_is_named(small: SmallRun) -> None:
    port = _serve_once(None, b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    with pytest.raises(TransferError, match="does not speak TLS"):
        probe(f"https://localhost:{port}", small.ca)


def test_answers_of_a_stranger_on_the_way_are_not_believed(small: SmallRun, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(small.run.ca / "server.crt", small.run.ca / "server.key")
    huge = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"
    for answer, words in ((huge, "larger than any"), (b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n", "answers 403")):
        address = f"https://localhost:{_serve_once(context, answer)}"
        with HttpCarrier(address, small.ca, tries=1) as carrier, pytest.raises(TransferError, match=words):
            carrier.fetch(small.base, "1." + "A" * 43, tmp_path / "w")
    assert not (tmp_path / "w").exists()


# --- arithmetic -------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**12), st.integers(1, 10**12))
def test_content_range_round_trip(offset: int, total: int) -> None:
    offset = min(offset, total)
    assert parse_content_range(content_range(offset, total), total) == offset


@given(st.text(max_size=40) | st.from_regex(r"bytes (\d{1,4}-\d{1,4}|\*)/(\d{1,4}|\*)", fullmatch=True))
def test_only_what_we_write_is_a_content_range(text: str) -> None:
    offset = parse_content_range(text, 1000)
    assert offset is None or content_range(offset, 1000) == text


@given(st.binary(max_size=60), st.lists(st.integers(1, 30), max_size=30))
def test_hash_is_over_the_tensor_bytes_however_they_come(data: bytes, cuts: list[int]) -> None:
    content = Layout.of([("w", (15,), "parameter")]).header() + data
    sha, at = _Hash(), 0
    for cut in [*cuts, len(content)]:
        sha.update(content[at : at + cut])
        at += cut
    assert sha.hexdigest() == hashlib.sha256(data).hexdigest() and sha.size == len(content)
