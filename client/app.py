"""The Flower ClientApp of a site: carries bytes between coordinator and trainer, and answers with a code.

Flower starts a process of this for every message. It holds no key and reads no file of the vault; the trainer decides.
Where the home is comes from the agent's environment, never from a message or Flower's configuration.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from rin.client.airlock import Stub
from rin.client.home import Home, default_root
from rin.client.rendezvous import socket_path
from rin.client.trainer import Done
from rin.common.errors import RefusedError, RinError, StateError
from rin.common.events import Events
from rin.common.files import read_json
from rin.common.keys import decode
from rin.common.log import chain_of, frames_of
from rin.common.transfer import HttpCarrier
from rin.common.wire import RECORD, Reply, Request, SignedRefusal, from_bytes, read_train_record, reply_record

log = logging.getLogger(__name__)

NOBODY: Final = "0" * 64  # request id of an answer to a message that could not be read
PATIENCE: Final = 60.0  # seconds that the trainer may be silent: a restart takes a few
BREAKS: Final = 5  # streams of one request that may break; a trainer that dies that often needs a person
PAUSE: Final = 2.0  # seconds between two tries
GRACE: Final = 30.0  # seconds after the deadline, in which the trainer says so itself

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round."""
    records = message.content.config_records if message.has_content() else {}
    reply = answer(dict(records[RECORD]) if RECORD in records else {}, Home(default_root().resolve()))
    return _message(reply, message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Sites evaluate nothing for others (threat T6)."""
    return _message(Reply(request=NOBODY, code="bad-request"), message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Sites answer no questions."""
    return _message(Reply(request=NOBODY, code="bad-request"), message)


def _message(reply: Reply, to: Message) -> Message:
    return Message(content=RecordDict({RECORD: ConfigRecord(reply_record(reply))}), reply_to=to)


def answer(record: Mapping[str, Any], home: Home) -> Reply:
    """Do what the flat scalars of a train message ask; whatever happens, the answer is a code."""
    request_id = NOBODY
    try:
        request, ticket, plan = read_train_record(dict(record))
        request_id = request.id
        _carry(home, request, ticket, plan)
    except RinError as error:
        log.warning("request refused: %s", error.code)
        return Reply(request=request_id, code=error.code, note=_note(error))
    except Exception as error:  # noqa: BLE001 - the edge of the process: neither text nor trace may travel
        frames = " ".join(frames_of(error.__traceback__))
        log.error("request failed: %s at %s", " from ".join(chain_of(error)), frames)
        return Reply(request=request_id, code="internal")
    return Reply(request=request_id)


def _note(error: RinError) -> SignedRefusal | None:
    """The trainer's signed word about `error`, where it gave one."""
    if not isinstance(error, RefusedError) or not error.note:
        return None
    with contextlib.suppress(RefusedError):
        return from_bytes(SignedRefusal, error.note)
    return None


def _carry(home: Home, request: Request, ticket: str, plan: bytes) -> None:
    """Global weights in, the trainer's work, the update out."""
    end = time.monotonic() + request.deadline_s
    place = read_json(home.net / "coordinator.json")
    with (
        Stub(socket_path(home)) as trainer,
        HttpCarrier(place["address"], home.net / "ca.crt", place.get("proxy")) as carrier,
    ):
        if _patiently(trainer.hello).site != request.site:
            raise RefusedError("bad-request", "the message is for another site")
        _fetch(carrier, home.inbox, request.base, ticket)
        try:
            done = _train(trainer, request, plan, end)
        except RefusedError as error:
            if error.code != "bad-weights":
                raise
            (home.inbox / request.base).unlink(missing_ok=True)  # damaged on our disk: once more
            _fetch(carrier, home.inbox, request.base, ticket)
            done = _train(trainer, request, plan, end)
        manifest, signature = _papers(home.outbox / f"{done.request}.json")
        update = home.outbox / f"{done.request}.safetensors"
        carrier.send(request.round, request.site, ticket, update, manifest, signature)
    Events(home.net / "log" / "events.jsonl").add("update-sent", round=request.round)


def _fetch(carrier: HttpCarrier, inbox: Path, digest: str, ticket: str) -> None:
    """The global weights into the inbox, where nothing else stays."""
    inbox.mkdir(parents=True, exist_ok=True)
    for path in inbox.iterdir():
        if digest not in path.name:
            path.unlink(missing_ok=True)
    carrier.fetch(digest, ticket, inbox / digest)


def _train(trainer: Stub, request: Request, plan: bytes, end: float) -> Done:
    """Ask the trainer until it answers: a trainer that died is restarted by the supervisor and begins again."""
    for _ in range(BREAKS):
        try:
            return trainer.train(request, plan, timeout=max(0.0, end - time.monotonic()) + GRACE)
        except RefusedError as error:
            if error.code != "trainer-away":
                raise
        if time.monotonic() > end:
            raise RefusedError("deadline")
        time.sleep(PAUSE)
        _patiently(trainer.hello)
    raise RefusedError("trainer-away")


def _patiently(hello: Callable[[], Any]) -> Any:
    """`hello`, tried again while the trainer is away."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return hello()
        except RefusedError as error:
            if error.code != "trainer-away" or time.monotonic() > until:
                raise
        time.sleep(PAUSE)


def _papers(path: Path) -> tuple[bytes, bytes]:
    """Manifest and signature as the trainer published them."""
    facts = read_json(path)
    manifest, signature = decode(facts["manifest"]), decode(facts["signature"])
    if manifest is None or signature is None:
        raise StateError("the outbox holds no manifest", step="look into vault/log/trainer.jsonl")
    return manifest, signature
