"""Passing Flower's Fleet calls on: a literal table, the three node headers, small bodies, one client to loopback."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import httpx

from rin.common.keys import client_context
from rin.server.exchange import Exchange, Headers, Refusal
from rin.server.quota import Quota

MAX_BODY: Final = 256 << 10  # bytes: messages are digests (threat T18)
BODY_S: Final = 30.0  # for a whole body to arrive
NODE_HEADERS: Final = ("flwr-public-key", "flwr-signature", "flwr-timestamp")  # node authentication of flwr 1.41

# What a keyed SuperNode calls (threat T1); register-node and unregister-node are not among it.
UPSTREAM: Final[dict[tuple[str, bytes], str]] = {
    ("POST", b"/v1/fleet/activate-node"): "/v1/fleet/activate-node",
    ("POST", b"/v1/fleet/deactivate-node"): "/v1/fleet/deactivate-node",
    ("POST", b"/v1/fleet/send-node-heartbeat"): "/v1/fleet/send-node-heartbeat",
    ("POST", b"/v1/fleet/pull-messages"): "/v1/fleet/pull-messages",
    ("POST", b"/v1/fleet/push-messages"): "/v1/fleet/push-messages",
    ("POST", b"/v1/fleet/get-run"): "/v1/fleet/get-run",
    ("POST", b"/v1/fleet/get-fab"): "/v1/fleet/get-fab",
    ("POST", b"/v1/fleet/push-object"): "/v1/fleet/push-object",
    ("POST", b"/v1/fleet/pull-object"): "/v1/fleet/pull-object",
    ("POST", b"/v1/fleet/confirm-message-received"): "/v1/fleet/confirm-message-received",
    ("GET", b"/health"): "/health",
}

# RFC 9110 section 7.6.1, and what the two HTTP stacks write themselves. httpx has undone the content coding.
_DROPPED: Final = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te"),
        *(b"trailer", b"transfer-encoding", b"upgrade", b"host", b"content-length", b"content-encoding"),
        *(b"accept-encoding", b"expect", b"date", b"server"),
    }
)


class Fleet:
    """The way to the SuperLink on 127.0.0.1:`port`, whose certificate `ca` signed."""

    def __init__(self, ca: Path, port: int) -> None:
        self._base = f"https://127.0.0.1:{port}"
        self._client = httpx.AsyncClient(
            verify=client_context(ca),
            trust_env=False,
            timeout=httpx.Timeout(30.0, connect=2.0),
            # Shorter than uvicorn's 5 s at the other end, so that no call meets a connection that is being closed.
            limits=httpx.Limits(max_connections=64, keepalive_expiry=2.0),
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def forward(self, exchange: Exchange, target: str, quota: Quota) -> None:
        """Send the request on to `target` of the table, and its answer back.

        Raises:
            Refusal: 401 without the node headers, 413, 429, 502 when the SuperLink is down.
        """
        headers: Headers = []
        body = b""
        if exchange.method == "POST":
            node = [exchange.value(name) for name in NODE_HEADERS]
            if not all(node):
                raise Refusal(401)
            quota.call((exchange.peer, node[0]))
            headers, body = _end_to_end(exchange.headers), await _small_body(exchange)
        try:
            response = await self._client.request(
                exchange.method, self._base + target, headers=headers, content=body or None
            )
        except httpx.HTTPError:
            raise Refusal(502) from None
        rows = [*_end_to_end(response.headers.raw), (b"content-length", str(len(response.content)).encode())]
        await exchange.answer(response.status_code, rows, response.content)


def _end_to_end(headers: Headers) -> Headers:
    """The headers that are not between two neighbours only; those that `Connection` names are."""
    rows = [(name.lower(), value) for name, value in headers]
    named = {part.strip().lower() for name, value in rows if name == b"connection" for part in value.split(b",")}
    return [(name, value) for name, value in rows if name not in _DROPPED and name not in named]


async def _small_body(exchange: Exchange) -> bytes:
    """The whole body.

    Raises:
        Refusal: 413 above `MAX_BODY`.
        TimeoutError: it does not come.
    """
    length = exchange.value("content-length") or "0"
    if not length.isdecimal() or int(length) > MAX_BODY:
        raise Refusal(413)
    body, more = b"", True
    async with asyncio.timeout(BODY_S):
        while more:
            message = await exchange.receive()
            if message["type"] != "http.request":
                raise Refusal(400)
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY:
                raise Refusal(413)
    return body
