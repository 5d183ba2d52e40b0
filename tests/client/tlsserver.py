"""A coordinator's front door for tests: HTTPS on loopback that answers /health as it is told."""

from __future__ import annotations

import datetime as dt
import email.utils
import http.server
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rin.common import keys


class Door(http.server.ThreadingHTTPServer):
    """`ahead`: seconds by which its clock is ahead of this machine's. `paths`: what was asked for."""

    daemon_threads = True
    status, ahead = 200, 0.0

    def __init__(self, folder: Path, *, tls: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.paths: list[str] = []
        ca, ca_key = keys.make_ca("test")
        certificate, key = keys.make_server_certificate(ca, ca_key, [])
        for name, data in (("ca.crt", ca), ("server.crt", certificate), ("server.key", key)):
            (folder / name).write_bytes(data)
        self.ca = folder / "ca.crt"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(folder / "server.crt", folder / "server.key")
            self.socket = context.wrap_socket(self.socket, server_side=True)

    @property
    def address(self) -> str:
        return f"https://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A handshake that failed is what some tests are about."""


class _Handler(http.server.BaseHTTPRequestHandler):
    @property
    def door(self) -> Door:
        assert isinstance(self.server, Door)
        return self.server

    def _answer(self) -> None:
        self.door.paths.append(self.path)
        self.send_response(self.door.status if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = _answer

    def date_time_string(self, timestamp: float | None = None) -> str:
        now = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=self.door.ahead)
        return email.utils.format_datetime(now, usegmt=True)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@contextmanager
def front_door(folder: Path, *, tls: bool = True) -> Iterator[Door]:
    """A running `Door` whose certificates lie in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with Door(folder, tls=tls) as door:
        thread = threading.Thread(target=door.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield door
        finally:
            door.shutdown()
            thread.join()
