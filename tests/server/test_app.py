"""The port over a grid in memory: who is asked, what a reply means."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rin.common.chain import Head
from rin.common.files import write_json
from rin.common.wire import RECORD, Refusal, Reply, Request, SignedRefusal, read_train_record, reply_record
from rin.server.port import Answer
from rin.server.rundir import RunDir
from rin.server.superlink import nodes_file

PLAN = b"plan bytes"


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    """Flower's Message takes run and node from here."""
    identity = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
    before = {name: getattr(identity, f"_{name}", None) for name in ("run_id", "task_id", "node_id")}
    identity.run_id, identity.task_id, identity.node_id = 1, 1, 1
    yield
    for name, value in before.items():
        setattr(identity, f"_{name}", value)


class Grid:
    """The three calls of a Flower grid that are used; replies are put in by the test."""

    def __init__(self, *online: int) -> None:
        self.online = list(online)
        self.sent: dict[str, Any] = {}
        self.replies: dict[str, Any] = {}
        self.pulls: list[list[str]] = []

    def get_node_ids(self) -> list[int]:
        return self.online

    def push_messages(self, messages: list[Any]) -> list[str | None]:
        (message,) = messages
        if message.metadata.dst_node_id not in self.online:
            return [None]
        self.sent[f"m{len(self.sent)}"] = message
        return [f"m{len(self.sent) - 1}"]

    def pull_messages(self, ids: list[str]) -> list[Any]:
        self.pulls.append(list(ids))
        return [self.replies.pop(each) for each in ids if each in self.replies]

    def answer(self, number: int, *, code: str = "", request: str | None = None, record: Any = None) -> None:
        app = importlib.import_module("flwr.app")
        message = self.sent[f"m{number}"]
        if record is None:
            asked = read_train_record(dict(message.content.config_records[RECORD]))[0]
            record = reply_record(Reply(request=request or asked.id, code=code))
        content = app.RecordDict({RECORD: app.ConfigRecord(record)})
        self.replies[f"m{number}"] = app.Message(content, reply_to=message)

    def fail(self, number: int, code: int, reason: str) -> None:
        app = importlib.import_module("flwr.app")
        self.replies[f"m{number}"] = app.Message(app.Error(code, reason), reply_to=self.sent[f"m{number}"])


def request(site: str, number: int = 1) -> Request:
    return Request(run="a" * 32, round=number, site=site, plan="b" * 64, base="c" * 64, deadline_s=100.0)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    write_json(nodes_file(run), {"siteA": 11, "siteB": 12, "siteC": 13})
    return run


def port_of(grid: Grid, run: RunDir) -> Any:
    return importlib.import_module("rin.server.app").FlowerPort(grid, run)


def test_only_members_that_are_connected_can_be_reached(run: RunDir) -> None:
    assert port_of(Grid(11, 13, 99), run).sites() == {"siteA", "siteC"}


def test_a_message_carries_the_request_and_lives_as_long_as_the_round(run: RunDir) -> None:
    grid = Grid(11)
    port_of(grid, run).push("siteA", request("siteA"), "ticket", PLAN)
    message = grid.sent["m0"]
    assert read_train_record(dict(message.content.config_records[RECORD])) == (request("siteA"), "ticket", PLAN)
    assert (message.metadata.dst_node_id, message.metadata.ttl, message.metadata.message_type) == (11, 100.0, "train")


def test_replies_are_pulled_one_at_a_time_and_told_once(run: RunDir) -> None:
    grid = Grid(11, 12)
    port = port_of(grid, run)
    port.push("siteA", request("siteA"), "t", PLAN)
    port.push("siteB", request("siteB"), "t", PLAN)
    assert port.pull() == []
    grid.answer(0)
    grid.answer(1, code="no-data")
    assert port.pull() == [Answer("siteA", ""), Answer("siteB", "no-data")]
    assert port.pull() == []
    assert all(len(ids) == 1 for ids in grid.pulls)


@pytest.mark.parametrize(
    ("flower", "reason", "code"),
    [
        (2, "rin:policy", "policy"),
        (2, "<class 'ValueError'>:<'PatientID 12345'>", "internal"),
        (1, "", "internal"),
        (7, "", "internal"),
        (3, "", "lost"),
        (4, "", "lost"),
        (5, "", "lost"),
        (8, "rin:policy", "lost"),
        (0, "", "lost"),
    ],
)
def test_flowers_own_errors_are_lost_messages_and_only_a_sites_failure_is_one(
    run: RunDir, flower: int, reason: str, code: str
) -> None:
    grid = Grid(11)
    port = port_of(grid, run)
    port.push("siteA", request("siteA"), "t", PLAN)
    grid.fail(0, flower, reason)
    assert port.pull() == [Answer("siteA", code)]


def test_the_codes_of_flower_are_those_that_the_table_means() -> None:
    code = importlib.import_module("flwr.common.constant").ErrorCode
    app = importlib.import_module("rin.server.app")
    named = {code.LOAD_CLIENT_APP_EXCEPTION, code.CLIENT_APP_RAISED_EXCEPTION, code.MOD_FAILED_PRECONDITION}
    assert named | {code.INVALID_FAB} == app.FAILED_AT_SITE
    assert (code.NODE_UNAVAILABLE, code.CLIENT_APP_CRASHED, code.REPLY_MESSAGE_UNAVAILABLE) == (5, 8, 4)


def test_the_reply_to_an_older_round_is_dropped_and_a_repeat_of_the_same_is_not(run: RunDir) -> None:
    grid = Grid(11)
    port = port_of(grid, run)
    port.push("siteA", request("siteA", 1), "t", PLAN)
    port.push("siteA", request("siteA", 2), "t", PLAN)
    port.push("siteA", request("siteA", 2), "t2", PLAN)
    grid.answer(0)
    grid.answer(1)
    assert port.pull() == [Answer("siteA", "")]
    grid.answer(2)
    assert port.pull() == [Answer("siteA", "")]


def test_a_site_that_is_gone_is_lost_at_the_next_pull(run: RunDir) -> None:
    port = port_of(Grid(), run)
    port.push("siteA", request("siteA"), "t", PLAN)
    port.push("nobody", request("nobody"), "t", PLAN)
    assert port.pull() == [Answer("siteA", "lost"), Answer("nobody", "lost")]
    assert port.pull() == []


def test_what_is_no_reply_of_ours_is_a_bad_one_and_its_text_is_not_taken(run: RunDir) -> None:
    grid = Grid(11)
    port = port_of(grid, run)
    for record in ({"reply": b"{}"}, {"reply": "text"}, {"x": 1}):
        port.push("siteA", request("siteA"), "t", PLAN)
        grid.answer(len(grid.sent) - 1, record=record)
        assert port.pull() == [Answer("siteA", "bad-request")]
    port.push("siteA", request("siteA"), "t", PLAN)
    grid.answer(len(grid.sent) - 1, request="d" * 64)
    assert port.pull() == [Answer("siteA", "bad-request")]
    port.push("siteA", request("siteA"), "t", PLAN)
    grid.answer(len(grid.sent) - 1, code="patient 12345")
    assert port.pull() == [Answer("siteA", "internal")]


def test_a_note_comes_with_its_reply(run: RunDir) -> None:
    grid, asked = Grid(11), request("siteA")
    port = port_of(grid, run)
    port.push("siteA", asked, "t", PLAN)
    head = Head(count=3, digest="e" * 64)
    facts = {"run": asked.run, "round": 1, "site": "siteA", "request": asked.id, "code": "budget", "ledger": head}
    note = SignedRefusal(refusal=Refusal.model_validate(facts), signature="A" * 86 + "==")
    grid.answer(0, record=reply_record(Reply(request=asked.id, code="budget", note=note)))
    assert port.pull() == [Answer("siteA", "budget", note)]
