"""`rin-server status` reads a run directory, whether a coordinator runs or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rin.common.errors import CODES, StateError
from rin.common.events import Events
from rin.common.files import lock
from rin.common.labels import label_set_digest
from rin.common.plan import plan_digest
from rin.common.scores import GroupScores, groups
from rin.server import consortium
from rin.server.record import Counted, Failure, Record, read_record, write_record
from rin.server.rundir import RunDir
from rin.server.status import print_status, status
from rin.server.validation import summed


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
    assert facts["sites"]["siteA"] == {"admitted": False, "online": False, "updates": 1, "refused": {}, "why": ""}
    assert facts["sites"]["siteB"]["refused"] == {"disk-full": 2}
    assert facts["sites"]["siteB"]["why"] == CODES["disk-full"]
    assert facts["rounds"][0]["missing"] == ["siteB"]
    print_status(facts)
    shown = " ".join(capsys.readouterr().out.split())
    assert "disk-full 2" in shown
    assert f"round 1 without siteB: {CODES['disk-full']}" in shown
    assert "without siteA" not in shown


def test_figures_on_held_out_patients_are_shown(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(run)["validation"] is None
    base = read_record(run, 1)
    assert base is not None
    row = groups()["US", "usthyroid"][0].index
    figures = {"modality": "US", "anatomy": "usthyroid", "images": 80, "top1": 40, "positives": ((row, 50),)}
    sent = summed({"siteA": (GroupScores(**figures, hits=((row, 20),)),)}, {"siteA": (row,)}, {"siteA": 1.0})
    for number in (1, 2, 3, 4):
        write_record(run, base.with_(round=number, state="closed", validation=sent if number != 4 else None))
    facts = status(run)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["validation"]["checkpoint"] == 2
    assert facts["validation"]["figures"]["groups"][0]["top1"] == {"right": 40, "of": 80, "rough": 0}
    print_status(facts)
    shown = capsys.readouterr().out
    assert "3 of 3 rounds closed" in shown and "closing" in shown
    assert "checkpoint 2" in shown and "50.0 %" in shown and "40.0 %" in shown


def test_a_held_lock_means_running(run: RunDir) -> None:
    with lock(run.lock, holder="rin-server run"):
        facts = status(run)
    assert facts["coordinator"]["state"] == "running"
    assert facts["sites"]["siteA"]["online"]


def test_no_run_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="missing"):
        status(RunDir(tmp_path))
