"""The ClientApp between a real gateway and a real trainer: bytes are carried, and every failure is a code."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from rin.client import app as app_module
from rin.client.airlock import serve
from rin.client.app import NOBODY, answer, app
from rin.client.ledger import site_ledger
from rin.client.trainer import Trainer
from rin.common import keys
from rin.common.backbones import BACKBONES
from rin.common.files import read_json, write_json
from rin.common.keys import client_context
from rin.common.wire import RECORD, Reply, from_bytes, read_reply_record, reply_record, train_record
from rin.server import consortium as consortia
from rin.server import members, receipts, tickets
from rin.server.port import Answer, signed_head
from rin.server.rundir import RunDir
from tests.private_consortium import POLICY, consortium, request_of
from tests.simulator import TINY

if TYPE_CHECKING:
    from tests.client.conftest import SmallSite

    Make = Callable[..., SmallSite]


class Coordinator:
    """A run directory behind its gateway; the SuperLink behind that is not there and not needed."""

    def __init__(self, root: Path, plan: bytes, weights: Path) -> None:
        from rin.common import backbones
        from rin.common import weights as weight_files
        from rin.common.plan import parse_plan

        self.run = RunDir(root)
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
        self.address = f"https://127.0.0.1:{self.port}"
        consortia.init(self.run, plan=plan, address=self.address)
        network = backbones.build(parse_plan(plan).model)
        write_json(self.run.layout, weight_files.layout_of(network).to_json())
        self.run.weights.mkdir()
        shutil.copyfile(weights, self.run.weights_file(weights.name))
        self.id = read_json(self.run.facts)["run"]

    def admit(self, site: SmallSite) -> None:
        """Make the home a member that knows the way here."""
        signing = keys.signing_public(keys.load_signing_key(site.home.keys / "signing.key"))
        node = keys.node_public(keys.make_node_key())
        for number in (1, 2, 3):
            shutil.rmtree(self.run.receipts(number), ignore_errors=True)
        members.register(self.run, "siteA", node_key=node, signing_key=signing)
        site.home.net.mkdir(exist_ok=True)
        shutil.copyfile(self.run.ca / "ca.crt", site.home.net / "ca.crt")
        write_json(site.home.net / "coordinator.json", {"address": self.address, "site": "siteA"})

    def record(self, site: SmallSite, number: int) -> dict[str, Any]:
        request = site.request(number, run=self.id)
        ticket = tickets.issue(self.run, number, "siteA", plan=request.plan, base=request.base)
        return train_record(request, ticket=ticket, plan=site.plan_bytes)


@pytest.fixture(scope="module")
def coordinator(
    tmp_path_factory: pytest.TempPathFactory, global_weights: Path, plan_bytes: bytes
) -> Iterator[Coordinator]:
    there = Coordinator(tmp_path_factory.mktemp("coordinator") / "run", plan_bytes, global_weights)
    command = [sys.executable, "-m", "rin.server.gateway", "--run", str(there.run.root), "--reserve-gib", "0"]
    process = subprocess.Popen([*command, "--port", str(there.port), "--upstream-port", "9"], stderr=subprocess.DEVNULL)
    try:
        context = client_context(there.run.ca / "ca.crt")
        for _ in range(300):
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{there.address}/health", verify=context, trust_env=False)
                break
            time.sleep(0.1)
        yield there
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def site(small_site: Make, coordinator: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallSite:
    """A home that is a member; its inbox is empty."""
    here = small_site()
    (here.home.inbox / here.base).unlink()
    coordinator.admit(here)
    monkeypatch.setenv("RIN_SOCKET", str(tmp_path / "t.sock"))
    monkeypatch.setenv("RIN_HOME", str(here.home.root))
    monkeypatch.setattr(app_module, "PAUSE", 0.1)
    return here


@contextlib.contextmanager
def trainer(site: SmallSite) -> Iterator[None]:
    server = serve(Trainer(site.home), Path(os.environ["RIN_SOCKET"]))
    try:
        yield
    finally:
        server.stop(grace=None).wait()


def test_one_round_ends_with_a_receipt_and_again_with_the_same_answer(
    site: SmallSite, coordinator: Coordinator
) -> None:
    record = coordinator.record(site, 1)
    request = site.request(1, run=coordinator.id)
    (site.home.inbox / "older").write_bytes(b"weights of a round that is past")
    with trainer(site):
        assert answer(record, site.home) == Reply(request=request.id)
        receipt = receipts.receipt(coordinator.run, 1, "siteA")
        assert receipt is not None
        receipt.manifest.check(request)
        assert answer(record, site.home) == Reply(request=request.id)
    assert [path.name for path in site.home.inbox.iterdir()] == [site.base]


def test_weights_that_were_damaged_on_our_disk_are_fetched_again(site: SmallSite, coordinator: Coordinator) -> None:
    record = coordinator.record(site, 1)
    (site.home.inbox / site.base).write_bytes(b"half of it")
    with trainer(site):
        assert answer(record, site.home).code == ""


def test_a_trainer_that_comes_back_is_waited_for(site: SmallSite, coordinator: Coordinator) -> None:
    record, replies = coordinator.record(site, 2), list[Reply]()
    asking = threading.Thread(target=lambda: replies.append(answer(record, site.home)))
    asking.start()
    time.sleep(1.0)
    with trainer(site):
        asking.join(120)
    assert [reply.code for reply in replies] == [""]


def test_a_trainer_that_stays_away_is_a_code(
    site: SmallSite, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "PATIENCE", 0.5)
    assert answer(coordinator.record(site, 1), site.home).code == "trainer-away"


def test_the_coordinators_refusals_and_the_trainers_are_answered_as_they_are(
    site: SmallSite, coordinator: Coordinator
) -> None:
    record = coordinator.record(site, 1)
    with trainer(site):
        assert answer(record | {"ticket": "1." + "x" * 43}, site.home).code == "update-stranger"
        other = site.request(1, run=coordinator.id, site="siteB").to_bytes()
        assert answer(record | {"request": other}, site.home).code == "bad-request"
        (site.home.accepted / f"{site.request().plan}.toml").unlink()
        (site.home.inbox / site.base).write_bytes(b"there is something, so nothing is fetched")
        assert answer(record, site.home).code == "plan-not-accepted"


def test_what_the_trainer_signs_is_carried_as_it_is(
    coordinator: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKBONES, "resnet18", TINY)
    monkeypatch.setenv("RIN_SOCKET", str(tmp_path / "t.sock"))
    made = consortium(tmp_path, policy=POLICY.replace("epsilon = 50.0", "epsilon = 0.01"))
    request, home = request_of(made), made.homes["siteA"]  # the weights are in the inbox: nothing is fetched
    home.net.mkdir()
    shutil.copyfile(coordinator.run.ca / "ca.crt", home.net / "ca.crt")
    write_json(home.net / "coordinator.json", {"address": coordinator.address, "site": "siteA"})
    server = serve(Trainer(home), tmp_path / "t.sock")
    try:
        reply = answer(train_record(request, ticket="1.x", plan=made.run.plan.read_bytes()), home)
    finally:
        server.stop(grace=None).wait()
    assert reply.code == "budget" and reply.note is not None
    back = read_reply_record(reply_record(reply))
    assert signed_head(made.run, request, Answer("siteA", back.code, back.note)) == site_ledger(home).head


@pytest.mark.parametrize("record", [{}, {"request": b"{}", "ticket": "t", "plan": b""}, {"request": "text"}])
def test_what_cannot_be_read_is_a_bad_request_of_nobody(site: SmallSite, record: dict[str, Any]) -> None:
    assert answer(record, site.home) == Reply(request=NOBODY, code="bad-request")


def test_an_unexpected_fault_is_a_code_without_its_text(
    site: SmallSite, coordinator: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    record = coordinator.record(site, 1)
    (site.home.net / "coordinator.json").write_text('{"address": 5}')
    reply = answer(record, site.home)
    assert reply.code == "internal"
    assert str(site.home.root) not in reply.to_bytes().decode() + caplog.text


def message(kind: str, content: RecordDict) -> tuple[Message, Context]:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 2, 3
    found = Message(content, dst_node_id=2, message_type=kind)
    return found, Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})


def reply_of(kind: str, record: dict[str, Any]) -> Reply:
    answered = app(*message(kind, RecordDict({RECORD: ConfigRecord(record)})))
    value = answered.content.config_records[RECORD]["reply"]
    assert isinstance(value, bytes)
    return from_bytes(Reply, value)


def test_through_flower(site: SmallSite, coordinator: Coordinator) -> None:
    record = coordinator.record(site, 3)
    with trainer(site):
        assert reply_of("train", record) == Reply(request=site.request(3, run=coordinator.id).id)
    assert reply_of("train", {"x": 1}).code == "bad-request"


@pytest.mark.parametrize("kind", ["evaluate", "query"])
def test_nothing_but_training_is_answered(site: SmallSite, kind: str) -> None:
    assert reply_of(kind, {"request": b"which patients are there"}).code == "bad-request"


def test_a_clientapp_never_imports_torch_and_starts_quickly() -> None:
    code = (
        "import sys, time, rin.client.app; print(time.process_time(), {'torch', 'cv2'} & set(sys.modules) or 'light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = done.stdout.split()[-2:]
    assert heavy == "light"
    assert float(seconds) < 6.0  # 1.5 s on an idle machine, of which Flower's own import is more than half
