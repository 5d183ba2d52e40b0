"""History: closed rounds of a real run directory; open and failed ones are left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from rin.common.errors import ConfigError
from rin.common.labels import label_set_digest
from rin.common.plan import MetricName
from rin.server.bench.history import rounds_of, run_facts, shares
from rin.server.record import Counted, Failure, Record, State, write_record
from rin.server.rundir import RunDir

PLAN = f"""protocol = 1
name = "three hospitals"
label-set = "{label_set_digest()}"
[sites]
siteB = 2.0
siteA = 1.0
siteC = 1.0
[training]
rounds = 9
local-steps = 4
batch-size = 8
"""


def counted(metrics: dict[MetricName, float]) -> Counted:
    return Counted(update="a" * 64, norm=1.0, labels=(1,), steps=4, metrics=metrics, release="0.1.0", lock="b" * 64)


def record(number: int, state: State) -> Record:
    receipts = {
        "siteB": counted({"loss": 1.5, "top1": 8.0, "top5": 16.0, "images": 32.0}),
        "siteA": counted({"loss": 2.5}),
    }
    failures = (Failure(site="siteC", code="transfer"),) * 2 + (Failure(site="siteB", code="deadline"),)
    return Record(
        round=number,
        state=state,
        plan="c" * 64,
        base="d" * 64,
        cohort=("siteA", "siteB", "siteC"),
        receipts=receipts,
        failures=failures,
        seconds=12.5,
    )


def test_closed_rounds_are_told_with_shares_and_failures(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    states: list[State] = ["closed", "closed", "frozen"]
    for number, state in enumerate(states, start=1):
        write_record(run, record(number, state))
    first, second = rounds_of(run)
    assert (first.number, second.number) == (1, 2)
    assert first.seconds == 12.5
    assert [site.site for site in first.sites] == ["siteA", "siteB"]
    assert first.sites[0].metrics == {"loss": 2.5}
    assert first.sites[1].metrics == {"loss": 1.5, "images": 32.0, "top1": 0.25, "top5": 0.5}
    assert first.failures == (("siteB", "deadline", 1), ("siteC", "transfer", 2))


def test_counts_without_images_are_left_out() -> None:
    assert shares({"loss": 1.0, "top1": 5.0}) == {"loss": 1.0}
    assert shares({"top1": 0.0, "images": 0.0}) == {"images": 0.0}


def test_a_run_that_never_began_has_a_plan_and_no_rounds(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.plan.write_text(PLAN)
    assert rounds_of(run) == ()
    facts = run_facts(run)
    assert facts["sites"] == ["siteA", "siteB", "siteC"]
    assert (facts["name"], facts["rounds"], facts["strategy"], facts["privacy"]) == (
        "three hospitals",
        9,
        "fedavg",
        "none",
    )


def test_a_folder_without_a_plan_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        run_facts(RunDir(tmp_path))
