"""The public port: the literal table and what is not on it, over real TLS."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from rin.common import keys
from rin.server.fleet import MAX_BODY, NODE_HEADERS, UPSTREAM
from rin.server.gateway import Gateway
from tests.small_run import SmallRun, free_port

NODE = "flwr-public-key: a2V5\r\nflwr-signature: c2ln\r\nflwr-timestamp: 2026-11-23T00:00:00+00:00\r\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRun]:
    run = SmallRun(tmp_path_factory.mktemp("gateway"))
    with run.gateway("--tap", str(run.folder / "tap")):
        yield run


@pytest.fixture
def seen(small: SmallRun) -> Iterator[list[tuple[str, str, dict[str, str], bytes]]]:
    with small.upstream() as requests:
        yield requests


def post(target: str, headers: str = NODE, body: bytes = b"") -> bytes:
    head = f"POST {target} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode("latin-1") + body


# --- the literal table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method,path", list(UPSTREAM))
def test_the_table_is_passed_on(small: SmallRun, seen: list, method: str, path: bytes) -> None:
    body = b"\x00body" if method == "POST" else b""
    ask = post(path.decode(), NODE + "X-Mine: 1\r\nConnection: keep-alive, x-hop\r\nX-Hop: 1\r\n", body)
    status, headers, answer = small.raw(ask.replace(b"POST", method.encode(), 1))
    assert (status, answer, headers["x-kept"]) == (200, b"ok\n", "yes")
    assert "x-between" not in headers
    ((got_method, got_path, got, got_body),) = seen
    assert (got_method, got_path, got_body) == (method, path.decode(), body)
    assert got["host"].startswith("127.0.0.1:") and "x-hop" not in got
    if method == "POST":
        assert [got[name] for name in NODE_HEADERS] == ["a2V5", "c2ln", "2026-11-23T00:00:00+00:00"]
        assert got["x-mine"] == "1"


def test_the_table_is_flowers_without_registration() -> None:
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supernode import fleet_http_client

    source = Path(fleet_http_client.__file__).read_text()
    ours = {target for (method, _), target in UPSTREAM.items() if method == "POST"}
    theirs = {line.split('"')[1] for line in source.splitlines() if 'path="/v1/fleet/' in line}
    assert theirs - ours == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"} and ours < theirs
    assert NODE_HEADERS == (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)


HOSTILE = [
    "/",
    "*",
    "/v1",
    "/docs",
    "/openapi.json",
    "/v1/fleet/",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/control/list-runs",
    "/v1/runtime/acquire-task",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/%2E%2E/control/list-runs",
    "/v1/fleet/..%2fcontrol/list-runs",
    "/v1/fleet/..%2Fruntime/acquire-task",
    "/v1/fleet/%2e%2e%2fruntime/acquire-task",
    "/v1/fleet/%252e%252e/control/list-runs",
    "/v1/fleet/..\\control\\list-runs",
    "/v1/fleet/..;/control/list-runs",
    "/v1/fleet/pull-messages/../../control/list-runs",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages;x",
    "/v1/fleet/pull-messages?x=1",
    "/v1/fleet/pull-messages#x",
    "/v1/fleet/pull-messages%00",
    "/v1/fleet/pull%2dmessages",
    "/v1/fleet/Pull-Messages",
    "/V1/fleet/pull-messages",
    "//v1/fleet/pull-messages",
    "/v1//fleet/pull-messages",
    "/v1/./fleet/pull-messages",
    "/x/../v1/fleet/pull-messages",
    "https://localhost/v1/fleet/pull-messages",
    "http://127.0.0.1/v1/control/list-runs",
    "/health",
    "/health/../v1/control/list-runs",
]


@pytest.mark.parametrize("target", HOSTILE)
def test_every_other_target_is_404(small: SmallRun, seen: list, target: str) -> None:
    status, headers, body = small.raw(post(target, body=b"x"))
    assert (status, headers["content-length"], body) == (404, "0", b"")
    assert not seen


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "post"])
def test_every_other_method_is_404(small: SmallRun, seen: list, method: str) -> None:
    ask = post("/v1/fleet/pull-messages").replace(b"POST", method.encode(), 1)
    assert small.raw(ask)[0] == 404
    assert not seen


@pytest.mark.parametrize("method", ["HEAD", "POST", "OPTIONS"])
def test_health_is_get_only(small: SmallRun, seen: list, method: str) -> None:
    assert small.raw(post("/health").replace(b"POST", method.encode(), 1))[0] == 404
    assert not seen


@pytest.mark.parametrize("left_out", NODE_HEADERS)
def test_a_call_without_a_node_header_stays_here(small: SmallRun, seen: list, left_out: str) -> None:
    rows = "".join(line + "\r\n" for line in NODE.splitlines() if not line.startswith(left_out))
    assert small.raw(post("/v1/fleet/pull-messages", rows))[0] == 401
    assert small.raw(post("/v1/fleet/pull-messages", NODE + rows))[0] == 401  # two of the others: whose is it?
    assert not seen


def test_large_bodies_stay_here(small: SmallRun, seen: list) -> None:
    length = NODE + f"Content-Length: {MAX_BODY + 1}\r\n"
    ask = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: localhost\r\n{length}\r\n".encode()
    assert small.raw(ask)[0] == 413  # before a byte of it
    chunked = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: localhost\r\n{NODE}Transfer-Encoding: chunked\r\n\r\n"
    assert small.raw(chunked.encode() + b"50000\r\n" + b"x" * 0x50000)[0] == 413
    assert not seen
    assert small.raw(post("/v1/fleet/push-object", body=b"x" * MAX_BODY))[0] == 200


def test_502_at_once_when_the_superlink_is_down(small: SmallRun) -> None:
    began = time.monotonic()
    assert small.raw(post("/v1/fleet/pull-messages"))[::2] == (502, b"")
    assert small.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 502
    assert time.monotonic() - began < 2


def test_a_superlink_with_another_ca_is_not_trusted(small: SmallRun, tmp_path: Path) -> None:
    other = SmallRun(tmp_path, upstream_port=small.upstream_port)
    with other.upstream() as requests:
        assert small.raw(post("/v1/fleet/pull-messages"))[0] == 502
    assert not requests


def test_websockets_and_other_scopes_are_denied(small: SmallRun, seen: list) -> None:
    upgrade = (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    assert small.raw(upgrade)[0] == 200  # an ordinary GET: nothing is upgraded
    sent = []

    async def scope(kind: str) -> None:
        async def send(message: object) -> None:
            sent.append(message)

        async def receive() -> dict[str, str]:
            return {"type": "websocket.connect"}

        await Gateway(small.run, small.upstream_port)({"type": kind, "raw_path": b"/health"}, receive, send)

    asyncio.run(scope("websocket"))
    assert sent == [{"type": "websocket.close"}]


@pytest.mark.parametrize("ask", [b"\x00\x01\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nA b: c\r\n\r\n"])
def test_malformed_requests_get_an_empty_400(small: SmallRun, ask: bytes) -> None:
    status, _, body = small.raw(ask)
    assert (status, body) == (400, b"")


# --- what stays behind ------------------------------------------------------------------------------------------


def test_the_tap_holds_what_arrived(small: SmallRun, seen: list) -> None:
    small.raw(post("/v1/fleet/push-object", NODE + "X-Canary: in a header\r\n", b"canary in a body"))
    tapped = (small.folder / "tap").read_bytes()
    assert b"X-Canary: in a header" in tapped and b"canary in a body" in tapped
    assert (small.folder / "tap").stat().st_mode & 0o777 == 0o600


def test_a_taken_port_is_said_in_one_line(tmp_path: Path) -> None:
    small = SmallRun(tmp_path)
    with small.gateway():
        command = [sys.executable, "-m", "rin.server.gateway", "--run", str(small.run.root), "--upstream-port", "1"]
        done = subprocess.run([*command, "--port", str(small.port)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "Address already in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_gateway_imports_neither_flower_nor_torch() -> None:
    code = "import sys, rin.server.gateway; print({'flwr', 'torch', 'numpy', 'grpc'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_an_https_client_sees_an_ordinary_server(small: SmallRun, seen: list) -> None:
    with httpx.Client(verify=keys.client_context(small.ca), trust_env=False) as client:
        assert client.get(f"https://127.0.0.1:{small.port}/health").text == "ok\n"
    assert free_port() != small.port
