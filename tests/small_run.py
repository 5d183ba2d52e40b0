"""A small consortium for tests: one run directory, joined sites, weights of random bytes, a real gateway process."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rin.client import join
from rin.client.home import Home
from rin.common import keys
from rin.common.files import write_atomic, write_json
from rin.common.layout import Layout
from rin.common.plan import plan_digest
from rin.common.wire import Manifest
from rin.server import consortium, tickets
from rin.server.receipts import expected_request
from rin.server.rundir import RunDir

SITES = ("siteA", "siteB", "siteC")
LAYOUT = Layout.of([("conv.weight", (1000, 1500), "parameter"), ("bn.mean", (77,), "buffer")])  # 6 MB


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@dataclass
class Update:
    """One site's finished update with everything that travels."""

    number: int
    site: str
    ticket: str
    path: Path
    manifest: Manifest
    signature: bytes

    @property
    def headers(self) -> dict[str, str]:
        return {
            "Authorization": f"Bearer {self.ticket}",
            "X-Rin-Manifest": keys.encode(self.manifest.to_bytes()),
            "X-Rin-Signature": keys.encode(self.signature),
        }


@dataclass
class SmallRun:
    """`layout` may be replaced before the first update is made."""

    folder: Path
    layout: Layout = LAYOUT
    port: int = field(default_factory=free_port)
    upstream_port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.run = RunDir(self.folder / "run")
        consortium.init(self.run, plan=None, address=self.address)
        self.plan = plan_digest(self.run.plan.read_bytes())
        write_json(self.run.layout, self.layout.to_json())
        for site in SITES:
            self.join(site)
        self.base = self.publish(b"global")
        self.rounds = 0

    @property
    def address(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def ca(self) -> Path:
        return self.run.ca / "ca.crt"

    def home(self, site: str) -> Home:
        return Home(self.folder / site)

    def join(self, site: str, *, renew: bool = False) -> None:
        """Invite, join, admit."""
        paper, fingerprint = consortium.invite(self.run, site)
        answer = join.join(self.home(site), paper, fingerprint=fingerprint, renew=renew)
        consortium.admit(self.run, answer, join.join_fingerprint(answer))

    def content(self, seed: bytes) -> tuple[bytes, str]:
        """A weight file's bytes and the digest of its tensor bytes."""
        data = hashlib.shake_128(seed).digest(self.layout.data_bytes)
        return self.layout.header() + data, hashlib.sha256(data).hexdigest()

    def publish(self, seed: bytes) -> str:
        content, digest = self.content(seed)
        write_atomic(self.run.weights_file(digest), content)
        return digest

    def next_round(self) -> int:
        self.rounds += 1
        return self.rounds

    def ticket(self, number: int, site: str) -> str:
        return tickets.issue(self.run, number, site, plan=self.plan, base=self.base)

    def update(self, site: str, *, number: int | None = None, seed: bytes = b"update", signer: str = "") -> Update:
        """A ticket, a file and a signed manifest; the round is a new one unless `number` says another."""
        number = number or self.next_round()
        ticket = self.ticket(number, site)
        request = expected_request(self.run, tickets.check(self.run, ticket))
        content, digest = self.content(seed + site.encode())
        path = self.folder / f"{site}-{number}-{digest[:8]}.safetensors"
        path.write_bytes(content)
        manifest = Manifest(
            run=request.run,
            round=number,
            site=site,
            plan=self.plan,
            base=self.base,
            request=request.id,
            update=digest,
            steps=8,
            labels=(1, 2),
            metrics={},
            release="0.1.0",
            lock="0" * 64,
        )
        return Update(number, site, ticket, path, manifest, self.sign(signer or site, manifest))

    def sign(self, site: str, manifest: Manifest) -> bytes:
        key = keys.load_signing_key(self.home(site).keys / "signing.key")
        return keys.sign(key, manifest.signed_bytes())

    @contextlib.contextmanager
    def gateway(self, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """The gateway as its own process, listening."""
        log = (self.folder / "gateway.out").open("ab")
        command = [sys.executable, "-m", "rin.server.gateway", "--run", str(self.run.root), "--port", str(self.port)]
        process = subprocess.Popen(
            [*command, "--upstream-port", str(self.upstream_port), *options], stderr=log, stdout=log
        )
        try:
            wait_for_port(self.port, process)
            yield process
        finally:
            process.kill()
            process.wait()
            log.close()

    def raw(self, request: bytes, *, timeout: float = 10.0) -> tuple[int, dict[str, str], bytes]:
        """Send bytes over TLS as they are, and read one answer: status, headers in lower case, body.

        The status is 0 when the gateway has closed before it took all and its answer was lost on the way.
        """
        with self.connect(timeout=timeout) as link:
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                link.sendall(request)
            return read_answer(link)

    def connect(self, *, timeout: float = 10.0) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(self.ca))
        link = socket.create_connection(("127.0.0.1", self.port), timeout=timeout)
        return context.wrap_socket(link, server_hostname="localhost")

    @contextlib.contextmanager
    def upstream(self) -> Iterator[list[tuple[str, str, dict[str, str], bytes]]]:
        """A TLS server in the SuperLink's place; the list of what reached it: method, path, headers, body."""
        seen: list[tuple[str, str, dict[str, str], bytes]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(200)
                self.send_header("Content-Type", "application/protobuf")
                self.send_header("Content-Length", "3")
                self.send_header("X-Kept", "yes")
                self.send_header("Connection", "close, x-between")
                self.send_header("X-Between", "no")
                self.end_headers()
                self.wfile.write(b"ok\n")

            do_GET = do_POST = do_PUT = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", self.upstream_port), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.run.ca / "server.crt", self.run.ca / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield seen
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def read_answer(link: ssl.SSLSocket) -> tuple[int, dict[str, str], bytes]:
    """One HTTP answer: status 0 if the connection ended before one."""
    data = b""
    while b"\r\n\r\n" not in data and (block := _receive(link)):
        data += block
    head, _, body = data.partition(b"\r\n\r\n")
    if not head:
        return 0, {}, b""
    first, *rows = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, value in (row.split(": ", 1) for row in rows)}
    while len(body) < int(headers.get("content-length", "0")) and (block := _receive(link)):
        body += block
    return int(first.split()[1]), headers, body


def _receive(link: ssl.SSLSocket) -> bytes:
    try:
        return link.recv(65536)
    except (ConnectionError, ssl.SSLError):
        return b""


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the process ended with {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.5):
            return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on {port}")


def wait_for(condition: object, seconds: float = 10.0) -> None:
    """Wait until the callable `condition` is true."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def peak_memory(pid: int) -> int:
    """VmHWM of a process in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
