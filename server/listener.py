"""The gateway's listener: uvicorn over TLS with what a public port needs besides, and the tap of the demo."""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import os
import resource
import socket
import ssl
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rin.server.rundir import RunDir

MAX_CONNECTIONS: Final = 512
IDLE_S: Final = 15  # an open connection without a request; SuperNodes ask every 3 s
MAX_HEAD: Final = 48 << 10  # bytes; a manifest of 24 KiB in base64url fits
BUFFER: Final = 48 << 10  # bytes a connection and direction; with asyncio's 256 KiB ten uploads cost 13 MB more
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"  # TLS 1.2; those of 1.3 are fixed


class Connection(H11Protocol):
    """One connection: uvicorn's h11 protocol, which keeps the request target as it came, where httptools does not.

    Added are a ceiling on connections, a time for the head of a request, empty errors, and a tap.
    """

    tap: ClassVar[BinaryIO | None] = None  # open for appending: gets every byte that arrives, decrypted
    head_s: ClassVar[float] = 15.0  # for the whole head of a request, from the connection or from its first byte
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        for limit in ("set_read_buffer_limits", "set_write_buffer_limits"):  # only a TLS transport has the first
            getattr(transport, limit, lambda high: None)(high=BUFFER)
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        if self.tap is not None:
            self.tap.write(data)
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._watch_head()
        else:
            self._unwatch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch_head()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [(b"content-length", b"0"), (b"connection", b"close")]
            self.transport.write(self.conn.send(h11.Response(status_code=400, headers=headers)) or b"")
        self.transport.close()

    def _watch_head(self) -> None:
        if self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(self.head_s, self._drop)

    def _unwatch_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _drop(self) -> None:
        self._late = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        OSError: the port is taken, or not this account's to take.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)


def serve(app: Any, run: RunDir, sock: socket.socket, *, tap: Path | None = None) -> None:
    """Serve `app` on `sock` with the run's server certificate until a signal comes."""
    asyncio.sslproto.SSLProtocol.max_size = BUFFER  # type: ignore[attr-defined]  # no public name for it
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8 * MAX_CONNECTIONS)), hard))
    file = _open_tap(tap) if tap else None
    config = uvicorn.Config(
        app,
        loop="asyncio",  # uvloop is a fifth faster, but its buffers of 256 KiB a connection cannot be set
        http=type("Connection", (Connection,), {"tap": file}),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=MAX_HEAD,
        ssl_certfile=run.ca / "server.crt",
        ssl_keyfile=run.ca / "server.key",
        ssl_ciphers=_CIPHERS,
        ssl_context_factory=_context,
    )
    uvicorn.Server(config).run(sockets=[sock])


def _open_tap(path: Path) -> BinaryIO:
    """For the owner only: the tap holds tickets and updates."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0)


def _context(config: uvicorn.Config, default: Any) -> ssl.SSLContext:
    context: ssl.SSLContext = default()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
