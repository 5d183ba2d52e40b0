from __future__ import annotations

import asyncio
import asyncio.sslproto
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from uvicorn.server import ServerState

from rin.server import listener
from rin.server.listener import Connection
from tests.small_run import SmallRun, peak_memory, read_answer


async def _app(scope: dict, receive: object, send: object) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b""})  # type: ignore[operator]


class Hasty(Connection):
    head_s = 0.3


async def _closed_after(protocol: type[Connection], first: bytes, then: bytes = b"") -> tuple[float, bytes]:
    """Seconds until the server closes a connection on which `first` and later `then` came, and what it said."""
    config = uvicorn.Config(_app, ws="none", lifespan="off", log_config=None, timeout_keep_alive=5)
    config.load()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: protocol(config, ServerState(), {}), "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        began = time.monotonic()
        writer.write(first)
        await asyncio.sleep(0.1)
        writer.write(then)
        try:
            said = await asyncio.wait_for(reader.read(), 3.0)
        except (TimeoutError, ConnectionError):
            said = b""
        took = time.monotonic() - began
        writer.close()
    return took, said


@pytest.mark.parametrize("first", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nA: "])
def test_a_head_that_does_not_come_ends_the_connection(first: bytes) -> None:
    took, _ = asyncio.run(_closed_after(Hasty, first, b"a"))
    assert 0.2 < took < 2.0


def test_a_second_head_that_trickles_ends_the_connection_too() -> None:
    took, said = asyncio.run(_closed_after(Hasty, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HT"))
    assert said.startswith(b"HTTP/1.1 200") and 0.2 < took < 2.0


def test_connections_above_the_ceiling_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 0)
    took, said = asyncio.run(_closed_after(Connection, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert said == b"" and took < 1.0


def test_asyncio_still_has_the_buffer_that_is_made_smaller() -> None:
    assert isinstance(asyncio.sslproto.SSLProtocol.max_size, int)  # type: ignore[attr-defined]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallRun]:
    yield SmallRun(tmp_path)


def test_tls_is_1_2_or_newer_and_the_whole_head_is_bounded(small: SmallRun) -> None:
    with small.gateway() as process:
        with small.connect() as link:
            assert link.version() in ("TLSv1.2", "TLSv1.3")
            link.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"x" * (listener.MAX_HEAD + 1))
            assert read_answer(link)[0] in (400, 0)
        assert peak_memory(process.pid) < 90 << 20
