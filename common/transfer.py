"""The way of weight files between site and coordinator: HTTPS, resumable from both ends, hashed once, memory flat."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import logging
import os
import random
import re
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, Protocol, Self
from urllib.parse import urlsplit

import httpx

from rin.common.errors import CODES, RefusedError, TransferError
from rin.common.files import BLOCK, fsync_dir
from rin.common.keys import client_context, encode
from rin.common.layout import data_offset
from rin.common.wire import Manifest, from_bytes

log = logging.getLogger(__name__)

MAX_BYTES: Final = 4 << 30  # no weight file of a plan comes near it
TRIES: Final = 8  # in a row without a new byte: about a minute, then the coordinator's next push tries again
PAUSE: Final = 0.5  # s before the second try, doubled each time
MAX_PAUSE: Final = 30.0  # s
TIMEOUT: Final = httpx.Timeout(60.0, connect=15.0)  # s; between two blocks, not for the whole
_SEND_BLOCK: Final = 1 << 20
_RANGE: Final = re.compile(r"bytes (\d{1,13})-(\d{1,13})/(\d{1,13})")
_RETRY: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 507})

# Headers of our own; their names are part of the protocol.
MANIFEST: Final = "X-Rin-Manifest"
SIGNATURE: Final = "X-Rin-Signature"
OFFSET: Final = "X-Rin-Offset"  # answer to HEAD: bytes that have arrived
UPDATE: Final = "X-Rin-Update"  # beside 409: digest of the update that is the receipt
CODE: Final = "X-Rin-Code"  # beside every refusal: one of CODES


class Carrier(Protocol):
    """The two ways of a weight file. `HttpCarrier` is the real one; rin.server.carrier has its in-process twin."""

    def fetch(self, digest: str, ticket: str, target: Path) -> None:
        """Bring the global weights `digest` to `target`, whole and checked, or raise.

        Raises:
            RefusedError: the coordinator said no; its code says why.
            TransferError: they did not travel.
        """
        ...

    def send(self, number: int, site: str, ticket: str, path: Path, manifest: bytes, signature: bytes) -> None:
        """Bring the update at `path` of round `number` to the coordinator, so that it is a receipt, or raise.

        Args:
            manifest: canonical JSON, see rin.common.wire.
            signature: 64 bytes over it.

        Raises:
            RefusedError: the coordinator said no; its code says why.
            TransferError: it did not travel, or the file is not the manifest's.
        """
        ...


class HttpCarrier:
    """The carrier over HTTPS; one connection, kept open. Close it, or use `with`.

    Args:
        address: `https://host:port` of the gateway.
        ca: PEM file with the certificates to trust; no other is.
        proxy: URL; else HTTPS_PROXY and NO_PROXY of the environment, which loopback ignores.
        tries: transfers in a row that may fail without a new byte.
    """

    def __init__(self, address: str, ca: Path, proxy: str | None = None, *, tries: int = TRIES) -> None:
        self._tries = tries
        self._client = make_client(address, ca, proxy)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fetch(self, digest: str, ticket: str, target: Path) -> None:
        """See `Carrier.fetch`; what has arrived stays beside `target` as `.part` and is not fetched again."""
        if target.exists():
            return
        part = target.with_name(f".{target.name}.part")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._persist(lambda: self._fetch_once(digest, ticket, part), lambda: _size(part))
        part.replace(target)
        fsync_dir(target.parent)

    def send(self, number: int, site: str, ticket: str, path: Path, manifest: bytes, signature: bytes) -> None:
        """See `Carrier.send`; an upload goes on where the coordinator says that it stopped."""
        upload = _Upload(f"/v1/updates/{number}/{site}", ticket, path, manifest, signature)
        self._persist(lambda: upload.once(self._client), lambda: upload.reached)

    def _persist(self, attempt: Callable[[], None], progress: Callable[[], int]) -> None:
        """Repeat `attempt` with growing pauses until it succeeds, is refused, or brings nothing new too often."""
        best, idle = progress(), 0
        while True:
            try:
                return attempt()
            except httpx.HTTPError as error:
                failure = explain(error)
            except TransferError as error:
                failure = error
            if not failure.retry:
                raise failure
            best, idle = (now, 1) if (now := progress()) > best else (best, idle + 1)
            if idle >= self._tries:
                raise failure
            pause = min(PAUSE * 2 ** (idle - 1), MAX_PAUSE) * random.uniform(0.8, 1.2)
            log.info("transfer stopped at byte %d (%s); next try in %.1f s", best, failure.code, pause)
            time.sleep(pause)

    def _fetch_once(self, digest: str, ticket: str, part: Path) -> None:
        with _open_part(part) as file:
            sha = _Hash()
            while block := file.read(BLOCK):
                sha.update(block)
            resumed = sha.size > 0
            headers = _bearer(ticket) | ({"Range": f"bytes={sha.size}-"} if resumed else {})
            with self._client.stream("GET", f"/v1/weights/{digest}", headers=headers) as response:
                if response.status_code == 416:
                    file.truncate(0)
                    raise TransferError("the partial file is longer than the weights")
                _raise_for(response)
                total = _expected_size(response, sha.size)
                if total is None:  # a proxy dropped the range
                    file.truncate(0)
                    raise TransferError("the answer is not the range that was asked for")
                for block in response.iter_raw():
                    sha.update(block)
                    if sha.size > total:
                        break
                    file.write(block)
            if sha.size < total:
                raise TransferError("the connection ended early")
            if sha.size > total or sha.hexdigest() != digest:
                file.truncate(0)
                # Where a part lay already, it may be that which was damaged: once more from the start.
                raise TransferError("the weights do not match their digest", code="bad-weights", retry=resumed)
            os.fsync(file.fileno())


class _Upload:
    """One update on its way: HEAD asks how much has arrived, PUT brings the rest; `reached` is that offset."""

    def __init__(self, url: str, ticket: str, path: Path, manifest: bytes, signature: bytes) -> None:
        self._url, self._path = url, path
        self._digest = from_bytes(Manifest, manifest, code="update-manifest").update
        self._headers = _bearer(ticket) | {MANIFEST: encode(manifest), SIGNATURE: encode(signature)}
        self._restarted = False
        self.reached = 0

    def once(self, client: httpx.Client) -> None:
        with _open_source(self._path) as file:
            total = os.fstat(file.fileno()).st_size
            head = client.head(self._url, headers=self._headers)
            if self._is_there(head):
                return
            _raise_for(head)
            offset = _offset(head, total)
            self.reached = max(self.reached, offset)
            headers = self._headers | {
                "Content-Range": content_range(offset, total),
                "Content-Length": str(total - offset),
            }
            response = client.put(self._url, headers=headers, content=self._rest(file, offset, total))
        if self._is_there(response):
            return
        if offset and response.headers.get(CODE) == "update-digest" and not self._restarted:
            self._restarted = True  # what lay there was damaged; it is gone, so begin again
            raise TransferError("the part that had arrived was damaged")
        _raise_for(response)

    def _is_there(self, response: httpx.Response) -> bool:
        """Whether the receipt that stands in the way is this very update: an answer was lost, nothing else."""
        return response.status_code == 409 and response.headers.get(UPDATE) == self._digest

    def _rest(self, file: BinaryIO, offset: int, total: int) -> Iterator[bytes]:
        """The bytes from `offset` on; the last block goes out only if the whole file has the manifest's digest."""
        sha = _Hash()
        file.seek(0)
        while sha.size < offset and (block := file.read(min(BLOCK, offset - sha.size))):
            sha.update(block)
        while block := file.read(_SEND_BLOCK):
            sha.update(block)
            if sha.size >= total and sha.hexdigest() != self._digest:
                raise TransferError("the update is not the manifest's", code="update-digest", retry=False)
            yield block


class _Hash:
    """SHA-256 of a weight file's tensor bytes, from the file's bytes as they come."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._first = b""
        self.size = 0  # bytes taken, header included

    def update(self, block: bytes) -> None:
        if len(self._first) < 8:
            self._first += block[: 8 - len(self._first)]
        skip = data_offset(self._first) - self.size if len(self._first) == 8 else len(block)
        self.size += len(block)
        self._sha.update(memoryview(block)[skip:] if skip > 0 else block)

    def hexdigest(self) -> str:
        return self._sha.hexdigest()


def content_range(offset: int, total: int) -> str:
    """The Content-Range of the rest of a file from `offset` on (RFC 9110 section 14.4); the rest may be empty."""
    return f"bytes {offset}-{total - 1}/{total}" if offset < total else f"bytes */{total}"


def parse_content_range(text: str, total: int) -> int | None:
    """The offset in a Content-Range of a file of `total` bytes; None unless `content_range` would write it so."""
    match = _RANGE.fullmatch(text)
    offset = int(match[1]) if match else total
    return offset if content_range(offset, total) == text else None


def make_client(address: str, ca: Path, proxy: str | None = None) -> httpx.Client:
    """An HTTPS client for the gateway that trusts `ca` only.

    Raises:
        StateError: `ca` is missing or damaged.
    """
    trust_env = proxy is None and not _is_loopback(address)
    context = client_context(ca)
    return httpx.Client(base_url=address, verify=context, proxy=proxy, trust_env=trust_env, timeout=TIMEOUT)


# X.509 verification results of OpenSSL (x509_vfy.h) to what a person should do.
_CERTIFICATE: Final[dict[int, tuple[str, str]]] = {
    9: ("the coordinator's certificate is not valid yet", "set this machine's clock"),
    10: ("the coordinator's certificate has expired", "check this machine's clock, then ask for `rin-server renew`"),
    18: ("the coordinator shows another CA than the invite's", "check the address, or join again with a new invite"),
    19: ("the coordinator shows another CA than the invite's", "check the address, or join again with a new invite"),
    20: ("the coordinator shows another CA than the invite's", "check the address, or join again with a new invite"),
    62: ("the coordinator's certificate is for another name", "use the address of the invite"),
    64: ("the coordinator's certificate is for another address", "use the address of the invite"),
}


def explain(error: Exception) -> TransferError:
    """What an error of httpx means, with the next step; `retry` is False where repeating cannot help."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            unknown = ("the coordinator's certificate does not hold", "join again with a new invite")
            message, step = _CERTIFICATE.get(cause.verify_code, unknown)
            return TransferError(message, step=step, retry=False)
        if isinstance(cause, ssl.SSLError) and cause.reason in _NOT_TLS:
            return TransferError("what listens there does not speak TLS", step="check address and port", retry=False)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.ProxyError):
        return TransferError("the proxy refuses the connection", step="check proxy in site.toml or HTTPS_PROXY")
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return TransferError("nothing answers at the coordinator's address", step="check address, firewall and proxy")
    return TransferError(f"the connection broke ({type(error).__name__})", step="wait; the transfer goes on by itself")


_NOT_TLS: Final = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE"})


def _raise_for(response: httpx.Response) -> None:
    """Turn a refusal into our errors; the body is never looked at."""
    if response.status_code in (200, 201, 206):
        return
    code = response.headers.get(CODE, "transfer")
    code = code if code in CODES else "transfer"
    if response.status_code in _RETRY:
        raise TransferError(f"the coordinator answers {response.status_code}", code=code)
    if code == "transfer":
        message = f"something on the way answers {response.status_code}"
        raise TransferError(message, step="check address and proxy", retry=False)
    raise RefusedError(code)


def _expected_size(response: httpx.Response, offset: int) -> int | None:
    """The size of the whole file that `response` continues from `offset`; None if it does not.

    Raises:
        TransferError: larger than any weight file.
    """
    match = _RANGE.fullmatch(response.headers.get("content-range", ""))
    if response.status_code == 206 and match:
        total = int(match[3]) if int(match[1]) == offset and int(match[2]) == int(match[3]) - 1 else None
    else:
        length = response.headers.get("content-length", "")
        total = int(length) if offset == 0 and response.status_code == 200 and length.isdecimal() else None
    if total is not None and total > MAX_BYTES:
        raise TransferError("the weights are larger than any plan's", code="bad-weights", retry=False)
    return total


def _offset(response: httpx.Response, total: int) -> int:
    text = response.headers.get(OFFSET, "")
    if not text.isdecimal() or int(text) > total:
        raise TransferError("something on the way changed the answer", step="check address and proxy")
    return int(text)


def _bearer(ticket: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {ticket}", "Accept-Encoding": "identity"}


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.lstat().st_size
    return 0


def _open_part(path: Path) -> BinaryIO:
    """The partial file, for reading and appending; a link in its place is an error."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "rb+")


def _open_source(path: Path) -> BinaryIO:
    """A file of the outbox: regular, not a link.

    Raises:
        TransferError: it is not.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        raise TransferError("the update is not in the outbox", step="repeat the request", retry=False) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise TransferError("the update is no regular file", retry=False)
    return os.fdopen(fd, "rb")
