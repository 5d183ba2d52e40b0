"""The Flower ServerApp: it only translates between Flower's messages and the round loop."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from rin.common import log as logs
from rin.common.errors import RefusedError, RinError, StateError
from rin.common.events import Events
from rin.common.files import lock, read_json
from rin.common.flower import code_of_reason
from rin.common.supervise import note_process
from rin.common.wire import RECORD, Request, read_reply_record, train_record
from rin.server.port import LOST, Answer
from rin.server.rundir import RunDir
from rin.server.superlink import RUN_ENV, read_nodes, serverapp_file

log = logging.getLogger(__name__)

# Flower's error codes that mean: the site's ClientApp ran and failed. All others mean that a message, a reply, a
# process or a link was lost, and that the request may be sent again.
FAILED_AT_SITE: Final = frozenset({1, 2, 6, 7})  # load failed, app raised, mod refused, bundle refused


class _Grid(Protocol):
    """The part of flwr.serverapp.Grid that is used."""

    def get_node_ids(self) -> Any: ...
    def push_messages(self, messages: Any) -> Any: ...
    def pull_messages(self, message_ids: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class _Pending:
    site: str
    request: str


class FlowerPort:
    """The port of `rin.server.rounds` over a Flower grid.

    A site is always the one to which the message went, by nodes.json; what a reply says of its sender is not read.
    """

    def __init__(self, grid: _Grid, run: RunDir) -> None:
        self._grid, self._run = grid, run
        self._pending: dict[str, _Pending] = {}
        self._unsent: list[str] = []

    def sites(self) -> set[str]:
        """Sites whose SuperNode is connected now."""
        online = set(self._grid.get_node_ids())
        return {site for site, node in read_nodes(self._run).items() if node in online}

    def push(self, site: str, request: Request, ticket: str, plan: bytes) -> None:
        """Send one train message; replies to this site's other requests are dropped from now on."""
        self._pending = {
            key: each for key, each in self._pending.items() if each.site != site or each.request == request.id
        }
        node = read_nodes(self._run).get(site)
        content = RecordDict({RECORD: ConfigRecord(train_record(request, ticket=ticket, plan=plan))})
        sent: list[str | None] = []
        if node is not None:
            message = Message(
                content, node, MessageType.TRAIN, ttl=max(request.deadline_s, 1.0), group_id=str(request.round)
            )
            sent = list(self._grid.push_messages([message]))
        if sent and sent[0]:
            self._pending[sent[0]] = _Pending(site, request.id)
        else:
            self._unsent.append(site)

    def pull(self) -> list[Answer]:
        """What the replies since the last call say."""
        found = [Answer(site, LOST) for site in self._unsent]
        self._unsent = []
        for message_id in list(self._pending):
            for reply in self._grid.pull_messages([message_id]):
                pending = self._pending.pop(message_id, None)
                if pending is not None:
                    found.append(_answer(reply, pending))
        return found


def _answer(reply: Message, pending: _Pending) -> Answer:
    if reply.has_error():
        if reply.error.code in FAILED_AT_SITE:
            return Answer(pending.site, code_of_reason(reply.error.reason) or "internal")
        log.info("Flower lost a message, its code is %d", reply.error.code)
        return Answer(pending.site, LOST)
    try:
        record = reply.content.config_records[RECORD]
        said = read_reply_record(dict(cast(Any, record)))
    except (KeyError, RefusedError):
        return Answer(pending.site, "bad-request")
    if said.request != pending.request:
        return Answer(pending.site, "bad-request")
    return Answer(pending.site, said.known_code, said.note)


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds of the directory in RIN_RUN. The edge of the process: no exception's text goes to Flower."""
    run = RunDir(Path(os.environ[RUN_ENV]))
    logs.setup(run.log / "serverapp.jsonl", stderr=False)
    try:
        _main(grid, run, epoch=int(cast(int, context.run_config["epoch"])))
    except Exception as error:
        log.exception("the rounds ended")
        raise RuntimeError(logs.name_of(error)) from None


def _main(grid: Grid, run: RunDir, *, epoch: int) -> None:
    if read_json(run.facts)["epoch"] != epoch:
        raise StateError("this run was submitted by an earlier coordinator")
    with lock(run.state / "rounds.lock", holder="rin-server run"):  # a round loop that hangs keeps a second one out
        note_process(serverapp_file(run))
        from rin.server import rounds  # imports torch

        try:
            rounds.run(run, FlowerPort(grid, run), epoch=epoch)
        except RinError as error:
            Events(run.log / "events.jsonl").add("rounds-stopped", reason=error.message, step=error.step)
            raise
