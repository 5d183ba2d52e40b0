"""One HTTP request at the gateway: its headers, its answer without a body, its line in the access log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from typing import Any, Final

from rin.common.keys import decode
from rin.common.transfer import CODE
from rin.server.tickets import Grant

access = logging.getLogger("rin.server.gateway.access")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

STALL_S: Final = 60.0  # for each block of a transfer, in either direction: at least 9 KiB/s
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT"})


class Refusal(Exception):
    """An answer without a body that ends request and connection; `code` is one of CODES or empty."""

    def __init__(self, status: int, code: str = "", headers: Headers | None = None) -> None:
        super().__init__(status)
        self.status, self.code, self.headers = status, code, headers or []


class Exchange:
    """A request and its answer. `route` and `grant` are filled in as they become known, for the log."""

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: bytes = scope["raw_path"]
        self.query: bytes = scope["query_string"]
        self.headers: Headers = scope["headers"]
        self.peer: str = (scope.get("client") or ("-",))[0]
        self.scope = scope
        self.route = "-"
        self.grant: Grant | None = None
        self.status, self.received, self.sent = 0, 0, 0
        self._receive, self._send = receive, send
        self._began = time.monotonic()

    async def receive(self) -> Message:
        message = await self._receive()
        self.received += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        """Send on; a peer that takes nothing for `STALL_S` is a TimeoutError."""
        async with asyncio.timeout(STALL_S):
            await self._send(message)
        self.status = message.get("status", self.status)
        self.sent += len(message.get("body", b""))

    async def answer(self, status: int, headers: Headers | None = None, body: bytes = b"") -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": headers or []})
        await self.send({"type": "http.response.body", "body": body})

    async def refuse(self, status: int, code: str = "", headers: Headers | None = None) -> None:
        """Refuse without a body, and end the connection, so that the rest of the request is not read.

        Raises:
            ConnectionAbortedError: the answer has begun; uvicorn then cuts the connection.
        """
        if self.status:
            raise ConnectionAbortedError
        rows = [(b"content-length", b"0"), (b"connection", b"close"), *(headers or [])]
        if code:
            rows.append((CODE.lower().encode(), code.encode()))
        with contextlib.suppress(TimeoutError):
            await self.answer(status, rows)

    def values(self, name: str) -> list[str]:
        """Every value of the header `name`."""
        wanted = name.lower().encode()
        return [value.decode("latin-1") for key, value in self.headers if key == wanted]

    def value(self, name: str) -> str | None:
        """The header `name` if it was sent exactly once."""
        found = self.values(name)
        return found[0] if len(found) == 1 else None

    def ticket(self) -> str:
        """The ticket, from the Authorization header and nowhere else.

        Raises:
            Refusal: 401.
        """
        value = self.value("authorization") or ""
        if not value.startswith("Bearer "):
            raise Refusal(401, "update-stranger")
        return value.removeprefix("Bearer ")

    def encoded(self, name: str) -> bytes:
        """The bytes of a base64url header.

        Raises:
            Refusal: 400.
        """
        data = decode(self.value(name) or "!")
        if data is None:
            raise Refusal(400, "bad-request")
        return data

    def log(self) -> None:
        """Write the line: no ticket, no header, no path that is not ours."""
        row: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "peer": self.peer,
            "method": self.method if self.method in _METHODS else "-",
            "route": self.route,
            "status": self.status,
            "in": self.received,
            "out": self.sent,
            "ms": round((time.monotonic() - self._began) * 1000),
        }
        if self.grant is not None:
            row |= {"site": self.grant.site, "round": self.grant.round}
        access.info("%s", json.dumps(row))
