"""`rin-server status` reads a run directory, whether a coordinator runs or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rin.common.errors import StateError
from rin.common.events import Events
from rin.common.files import lock
from rin.common.labels import label_set_digest
from rin.common.plan import plan_digest
from rin.server import consortium
from rin.server.record import Counted, Failure, Record, write_record
from rin.server.rundir import RunDir
from rin.server.status import print_status, status


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    text = f'protocol = 1\nname = "p"\nlabel-set = "{label_set_digest()}"\n[sites]\nsiteA = 1.0\nsiteB = 1.0\n'
    text += "[limits]\nmin-sites = 1\nquorum = 1\n[training]\nrounds = 3\nlocal-steps = 8\nbatch-size = 8\n"
    consortium.init(run, plan=text.encode(), address="https://localhost:8443")
    plan, digest = plan_digest(run.plan.read_bytes()), "0" * 64
    counted = Counted(update=digest, norm=1.0, labels=(1,), steps=8, metrics={}, release="0", lock=digest)
    record = Record(round=1, state="open", plan=plan, base=digest, cohort=("siteA", "siteB"))
    failures = (Failure(site="siteB", code="disk-full"), Failure(site="siteB", code="disk-full"))
    write_record(run, record.with_(receipts={"siteA": counted}, failures=failures))
    Events(run.log / "events.jsonl").add("site-online", site="siteA")
    return run


def test_status_counts_updates_and_refusals(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    facts = status(run)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["coordinator"]["state"] == "stopped"
    assert facts["sites"]["siteA"] == {"admitted": False, "online": False, "updates": 1, "refused": {}}
    assert facts["sites"]["siteB"]["refused"] == {"disk-full": 2}
    assert facts["rounds"][0]["missing"] == ["siteB"]
    print_status(facts)
    assert "disk-full 2" in capsys.readouterr().out


def test_a_held_lock_means_running(run: RunDir) -> None:
    with lock(run.lock, holder="rin-server run"):
        facts = status(run)
    assert facts["coordinator"]["state"] == "running"
    assert facts["sites"]["siteA"]["online"]


def test_no_run_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="missing"):
        status(RunDir(tmp_path))
