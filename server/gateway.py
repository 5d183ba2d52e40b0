"""The gateway, the coordinator's only public port: Fleet routes and /health go to the SuperLink on loopback.

Weights and updates are files of the run directory; every other path, method and kind of connection is 404.

`python -m rin.server.gateway --run DIR --host H --port N --upstream-port P [--tap FILE]`. With `--tap` every byte that
arrives, decrypted, is appended to FILE: so `rin-server demo` proves what left the sites. Never use it otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import logging.handlers
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import anyio.to_thread
from starlette.responses import FileResponse

from rin.common import log as logs
from rin.common.errors import RefusedError, RinError, TransferError
from rin.common.transfer import MANIFEST, OFFSET, SIGNATURE, UPDATE, parse_content_range
from rin.server import listener, tickets
from rin.server.exchange import STALL_S, Exchange, Message, Receive, Refusal, Send, access
from rin.server.fleet import UPSTREAM, Fleet
from rin.server.quota import Quota
from rin.server.receipts import RESERVE, Receiver, receipt, weights_for
from rin.server.rundir import RunDir

log = logging.getLogger(__name__)

_BLOCK: Final = 64 << 10  # bytes handed to the disk at once: memory stays flat in the number of sites
_THREADS: Final = 2  # that read, hash and write files
_WEIGHTS: Final = re.compile(rb"/v1/weights/([0-9a-f]{64})")
_UPDATES: Final = re.compile(rb"/v1/updates/([1-9][0-9]{0,5})/([A-Za-z0-9-]{1,32})")
_RANGE: Final = re.compile(r"bytes=[0-9]{1,13}-[0-9]{0,13}")  # one range; FileResponse reads it

# Refusal to status. A closed round is 410 and not 404: whoever holds a ticket of it may know, and must stop trying.
STATUS: Final[dict[str, int]] = {
    "bad-request": 400,
    "update-stranger": 401,
    "bad-weights": 404,
    "update-duplicate": 409,
    "update-late": 410,
    "update-length": 422,
    "update-header": 422,
    "update-digest": 422,
    "update-manifest": 422,
    "update-signature": 422,
    "transfer": 503,
    "disk-full": 507,
}


class Gateway:
    """The ASGI application.

    Args:
        upstream_port: of the SuperLink on 127.0.0.1.
        reserve: bytes that an upload must leave free on the run directory's disk.
    """

    def __init__(self, run: RunDir, upstream_port: int, *, reserve: int = RESERVE) -> None:
        self._run, self._reserve = run, reserve
        self._fleet = Fleet(run.ca / "ca.crt", upstream_port)
        self._quota = Quota()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        exchange = Exchange(scope, receive, send)
        try:
            await self._route(exchange)
        except Refusal as refusal:
            await exchange.refuse(refusal.status, refusal.code, refusal.headers)
        except (RefusedError, TransferError) as error:
            await exchange.refuse(STATUS.get(error.code, 422), error.code)
        except TimeoutError:
            await exchange.refuse(408, "transfer")
        except Exception as error:  # the edge of a request: nothing of it may reach the site
            log.error("a request failed", exc_info=error)
            await exchange.refuse(500, "internal")
        finally:
            exchange.log()

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS))
        anyio.to_thread.current_default_thread_limiter().total_tokens = _THREADS  # starlette's FileResponse
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._fleet.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _route(self, exchange: Exchange) -> None:
        """Compare the path as it came, undecoded; a query makes it another one."""
        if exchange.query:
            raise Refusal(404)
        method, path = exchange.method, exchange.path
        if (target := UPSTREAM.get((method, path))) is not None:
            exchange.route = target
            await self._fleet.forward(exchange, target, self._quota)
        elif method == "GET" and (match := _WEIGHTS.fullmatch(path)):
            exchange.route = "weights"
            await self._weights(exchange, match[1].decode())
        elif method in ("HEAD", "PUT") and (match := _UPDATES.fullmatch(path)):
            exchange.route = "updates"
            await self._updates(exchange, int(match[1]), match[2].decode())
        else:
            raise Refusal(404)

    async def _weights(self, exchange: Exchange, digest: str) -> None:
        token = exchange.ticket()
        exchange.grant = grant = await asyncio.to_thread(tickets.check, self._run, token)
        path = await asyncio.to_thread(weights_for, self._run, token, digest)
        if not all(_RANGE.fullmatch(value) for value in exchange.values("range")):
            raise Refusal(416, "bad-request")
        with self._quota.transfer(grant.ticket, lambda: exchange.sent, path.stat().st_size):
            response = FileResponse(path, media_type="application/octet-stream")
            await response(exchange.scope, exchange.receive, exchange.send)

    async def _updates(self, exchange: Exchange, number: int, site: str) -> None:
        """No byte of a body is read before ticket, path, manifest, signature and disk are in order."""
        token = exchange.ticket()
        exchange.grant = grant = await asyncio.to_thread(tickets.check, self._run, token)
        if (grant.round, grant.site) != (number, site):
            raise Refusal(403, "update-stranger")
        manifest, signature = exchange.encoded(MANIFEST), exchange.encoded(SIGNATURE)
        try:
            receiver = await asyncio.to_thread(Receiver, self._run, token, manifest, signature, reserve=self._reserve)
            await asyncio.to_thread(receiver.reserve)
            if exchange.method == "HEAD":
                return await exchange.answer(200, [(OFFSET.lower().encode(), str(receiver.offset()).encode())])
            with self._quota.transfer(grant.ticket, lambda: exchange.received, receiver.weights_bytes):
                await _take_in(exchange, receiver)
        except RefusedError as error:
            if error.code != "update-duplicate":
                raise
            there = await asyncio.to_thread(receipt, self._run, number, site)
            known = [(UPDATE.lower().encode(), there.manifest.update.encode())] if there else []
            raise Refusal(409, error.code, known) from None


async def _take_in(exchange: Exchange, receiver: Receiver) -> None:
    """Stream the body of a PUT into `receiver`; what has arrived when it is cut stays."""
    start = _start(exchange, receiver.total)
    try:
        await asyncio.to_thread(receiver.__enter__)
        if receiver.offset() != start:  # another connection was faster: the site asks again where to go on
            raise Refusal(503, "transfer")
        if await _stream(exchange, receiver):
            done = await asyncio.to_thread(receiver.finish)
            headers = [(b"content-length", b"0"), (UPDATE.lower().encode(), done.manifest.update.encode())]
            await exchange.answer(201, headers)
    finally:
        receiver.close()


async def _stream(exchange: Exchange, receiver: Receiver) -> bool:
    """Hand the body on in blocks; whether it came to its end. Each block has `STALL_S` to arrive."""
    waiting: list[bytes] = []
    size, more = 0, True
    clock = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(STALL_S) as limit:
            while more:
                message = await exchange.receive()
                if message["type"] != "http.request":
                    return False
                waiting.append(message.get("body", b""))
                size, more = size + len(waiting[-1]), message.get("more_body", False)
                if size >= _BLOCK:
                    pieces, waiting, size = waiting, [], 0
                    await asyncio.to_thread(receiver.append, pieces)
                    limit.reschedule(clock() + STALL_S)
        return True
    finally:
        if waiting:
            await asyncio.to_thread(receiver.append, waiting)


def _start(exchange: Exchange, total: int) -> int:
    """Where the body of a PUT begins; it always reaches to the end of the file.

    Raises:
        Refusal: 411 without a length, 422 if length, range and the plan's total do not fit.
    """
    length, ranges = exchange.value("content-length"), exchange.values("content-range")
    if length is None or not length.isdecimal() or exchange.values("transfer-encoding"):
        raise Refusal(411, "bad-request")
    start = parse_content_range(ranges[0], total) if len(ranges) == 1 else None if ranges else 0
    if start is None or int(length) != total - start:
        raise Refusal(422, "update-length")
    return start


def _access_log(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=16 << 20, backupCount=4, encoding="utf-8")
    access.addHandler(handler)
    access.propagate = False


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal comes; 1 if the port cannot be had."""
    parser = argparse.ArgumentParser(prog="rin.server.gateway", description="The coordinator's public port.")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream-port", type=int, required=True, help="of the SuperLink on loopback")
    parser.add_argument("--reserve-gib", type=float, default=RESERVE / 2**30, help="disk space that uploads leave free")
    parser.add_argument("--tap", type=Path, help="append every byte that arrives to this file")
    args = parser.parse_args(argv)
    run = RunDir(args.run)
    logs.setup(run.log / "gateway.jsonl")
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it logs an attacker's every malformed byte
    _access_log(run.log / "access.jsonl")
    try:
        gateway = Gateway(run, args.upstream_port, reserve=int(args.reserve_gib * 2**30))
        sock = listener.listen(args.host, args.port)
    except OSError as error:
        log.error("cannot listen on port %d: %s", args.port, error.strerror or "")
        return 1
    except RinError as error:
        log.error("%s", error)
        return 1
    listener.serve(gateway, run, sock, tap=args.tap)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
