"""The coordinator's supervisor: what it shows, when it is finished, what stops it; the processes are in integration."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rin.common import keys
from rin.common.errors import ConfigError, StateError
from rin.common.events import KINDS, Event
from rin.common.files import lock, read_json
from rin.common.plan import Plan, read_plan
from rin.server import consortium, members
from rin.server import run as coordinator
from rin.server.record import Record, write_record
from rin.server.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    import logging

    before = list(logging.getLogger().handlers)
    hook = sys.excepthook
    run = RunDir(tmp_path / "run")
    consortium.init(run, plan=None, address="https://localhost:8443")
    yield run
    for handler in list(logging.getLogger().handlers):
        if handler not in before:
            logging.getLogger().removeHandler(handler)
            handler.close()
    for handler in before:
        if handler not in logging.getLogger().handlers:
            logging.getLogger().addHandler(handler)
    sys.excepthook = hook
    logging.captureWarnings(False)


def plan_of(run: RunDir) -> Plan:
    return read_plan(run.plan)[0]


def round_of(number: int, state: str) -> Record:
    value = {"round": number, "state": state, "plan": "a" * 64, "base": "b" * 64, "cohort": ["siteA"]}
    return Record.model_validate_json(json.dumps(value))


def test_finished_means_that_the_last_round_of_the_plan_is_closed(run: RunDir) -> None:
    plan = plan_of(run)
    assert not coordinator.finished(run, plan)
    assert not coordinator.is_open(run)
    write_record(run, round_of(1, "closed"))
    assert not coordinator.finished(run, plan)
    write_record(run, round_of(plan.training.rounds, "frozen"))
    assert not coordinator.finished(run, plan)
    assert coordinator.is_open(run)
    write_record(run, round_of(plan.training.rounds, "closed"))
    assert coordinator.finished(run, plan)


def test_a_finished_run_has_nothing_to_do_and_keeps_its_epoch(run: RunDir) -> None:
    write_record(run, round_of(plan_of(run).training.rounds, "closed"))
    assert coordinator.run_coordinator(run, host="127.0.0.1", port=None) == 0
    assert read_json(run.facts)["epoch"] == 0


def test_a_second_coordinator_is_refused(run: RunDir) -> None:
    with lock(run.lock, holder="rin-server run"), pytest.raises(StateError, match="already works"):
        coordinator.run_coordinator(run, host="127.0.0.1", port=None)


def test_a_taken_port_is_said_before_anything_starts(run: RunDir) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ConfigError, match="cannot listen"):
        coordinator.run_coordinator(run, host="127.0.0.1", port=server.getsockname()[1])
    assert not run.state.exists()
    assert read_json(run.facts)["epoch"] == 0


def test_a_certificate_near_its_end_is_warned_of_and_an_expired_one_stops(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keys, "days_left", lambda certificate: 29)
    with caplog.at_level("WARNING", logger="rin"):
        coordinator._warn_of_expiry(run)
    assert "29 days" in caplog.text
    monkeypatch.setattr(keys, "days_left", lambda certificate: -1)
    with pytest.raises(StateError, match="expired"):
        coordinator._warn_of_expiry(run)


def test_every_line_belongs_to_an_event_and_uses_its_fields() -> None:
    values = {"sites": ["siteA", "siteB"], "seconds": 3.2, "round": 7, "site": "siteA", "code": "policy"}
    for kind in coordinator.LINES:
        fields = {name: values.get(name, "x") for name in KINDS[kind]}
        line = coordinator.line_of(Event("t", kind, fields))
        assert line is not None
        assert "{" not in line
    assert coordinator.line_of(Event("t", "round-opened", values)) == "round 7: asked siteA, siteB"
    assert coordinator.line_of(Event("t", "request-sent", values)) is None
    assert coordinator.line_of(Event("t", "round-closed", {})) == "round-closed"


def test_rounds_wait_for_members_but_an_open_round_goes_on(run: RunDir) -> None:
    plan = plan_of(run)
    this = coordinator._Coordinator(run, plan, 1, "127.0.0.1", 8443, None, lambda event: None)
    assert not this.due()
    for index, site in enumerate(list(plan.sites)[: plan.limits.quorum]):
        public = keys.node_public(keys.make_node_key())
        members.register(run, site, node_key=public, signing_key=f"{index:x}" * 64)
    assert this.due()
    members.strike(run, next(iter(plan.sites)))
    assert not this.due()
    write_record(run, round_of(1, "open"))
    assert this.due()
    this.failed = True
    assert not this.due()


def test_the_supervisor_imports_no_torch() -> None:
    code = "import sys, rin.server.run; sys.exit(bool({'torch', 'flwr', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
