"""Private rounds through real trainers: the debit comes first and once, the ceiling holds, and what is then claimed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rin.client.join import plan_summary
from rin.client.ledger import site_ledger
from rin.client.private import claim, row_of
from rin.client.site import read_site
from rin.client.status import status
from rin.client.trainer import Trainer
from rin.common import egress, keys, snapshots
from rin.common.accountant import epsilon
from rin.common.errors import RefusedError, RinError, StateError
from rin.common.files import read_json
from rin.common.ledger import debits
from rin.common.plan import parse_plan
from rin.common.statement import UNPROTECTED
from rin.common.weights import read_facts
from rin.common.wire import Manifest, Request, from_bytes
from tests.private_consortium import POLICY, SITES, consortium, private_plan, request_of
from tests.simulator import Consortium, quicken, record_of, small


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def manifest_of(made: Consortium, site: str, request: Request) -> Manifest:
    paper = keys.decode(read_json(made.homes[site].outbox / f"{request.id}.json")["manifest"])
    assert paper is not None
    return from_bytes(Manifest, paper)


def train(made: Consortium, request: Request, cancelled: Callable[[], str] = lambda: "") -> None:
    home = made.homes[request.site]
    Trainer(home).train(request, made.run.plan.read_bytes(), lambda progress: None, cancelled)


def interrupted(made: Consortium) -> Request:
    """A first request of siteA whose training was cancelled after its first steps."""
    request, asked = request_of(made), list[int]()

    def later() -> str:
        asked.append(1)
        return "cancelled" if len(asked) > 12 else ""

    with pytest.raises(RefusedError, match="cancelled"):
        train(made, request, later)
    return request


def test_a_run_debits_every_round_once_and_says_what_it_came_to(tmp_path: Path) -> None:
    made = consortium(tmp_path)
    made.go()
    rates = set()
    assert status(made.homes["siteA"])["budget"]["rounds_left"] > 0
    for site, home in made.homes.items():
        found = debits(site_ledger(home).entries())
        assert [debit.round for debit in found] == [1, 2]
        assert {debit.steps for debit in found} == {5}
        rates |= {debit.rate for debit in found}
        counted = record_of(made, 2).receipts[site]
        assert counted.metrics == {} and counted.scores == ()
        assert counted.privacy == claim(site_ledger(home), read_site(home))
        assert counted.privacy is not None and counted.privacy == record_of(made, 2).claims[site]
        shown = status(home)["budget"]
        assert (shown["epsilon"], shown["ceiling"], shown["entries"]) == (counted.privacy.epsilon, 50.0, 2)
        row = row_of(made.plan, read_site(home))
        assert counted.privacy.epsilon == pytest.approx(epsilon([row, row], 1e-3), abs=2e-3)
    assert rates == {0.1}
    facts = read_facts(made.run.checkpoint(2))
    assert facts["privacy_mode"] == "patient"
    assert sorted(facts["privacy_sites"]) == list(SITES)
    assert "differential privacy for each patient" in facts["privacy"] and "Not covered" in facts["privacy"]


def test_a_repeated_request_is_answered_and_costs_nothing(tmp_path: Path) -> None:
    made = consortium(tmp_path)
    request = request_of(made)
    train(made, request)
    first = manifest_of(made, "siteA", request)
    train(made, request)
    assert manifest_of(made, "siteA", request) == first
    assert len(site_ledger(made.homes["siteA"]).entries()) == 1
    assert first.privacy is not None and first.privacy.ledger.count == 1


def test_the_round_that_would_cross_the_ceiling_is_refused_before_its_first_step(tmp_path: Path) -> None:
    policy = POLICY.replace("epsilon = 50.0", "epsilon = 0.01")
    made = consortium(tmp_path, policy=policy)
    request = request_of(made)
    with pytest.raises(RefusedError) as caught:
        train(made, request)
    assert caught.value.code == "budget"
    assert "ledger show" in caught.value.step
    assert site_ledger(made.homes["siteA"]).entries() == []
    assert not list(made.homes["siteA"].outbox.iterdir())


def test_the_federation_goes_on_without_a_site_whose_budget_is_spent(tmp_path: Path) -> None:
    made = consortium(tmp_path, policy=POLICY + "min-sites = 2\n", limits={"min_sites": 2, "quorum": 2, "retries": 5})
    text = made.homes["siteB"].site_toml.read_text()
    made.homes["siteB"].site_toml.write_text(text.replace("epsilon = 50.0", "epsilon = 0.01"))
    port = made.go()
    for number in (1, 2):
        assert port.pushed.count(("siteB", number)) == 1
        assert sorted(record_of(made, number).receipts) == ["siteA", "siteC"]
        assert [(each.site, each.code) for each in record_of(made, number).failures] == [("siteB", "budget")]
    assert site_ledger(made.homes["siteB"]).entries() == []


def test_a_site_whose_ceiling_was_raised_is_in_the_next_round(tmp_path: Path) -> None:
    made = consortium(tmp_path, policy=POLICY + "min-sites = 2\n", limits={"min_sites": 2, "quorum": 2})
    path = made.homes["siteB"].site_toml
    text = path.read_text()
    path.write_text(text.replace("epsilon = 50.0", "epsilon = 0.01"))

    def raised(request: Request) -> None:
        if request.round == 2:
            path.write_text(text)

    made.go(made.port(before=raised))
    assert "siteB" not in record_of(made, 1).receipts
    assert sorted(record_of(made, 2).receipts) == list(SITES)


def test_an_interrupted_round_goes_on_inside_its_debit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "EVERY", 0.0)
    made = consortium(tmp_path)
    request = interrupted(made)
    ledger = site_ledger(made.homes["siteA"])
    assert len(ledger.entries()) == 1  # charged before its first step
    train(made, request)
    assert len(ledger.entries()) == 1
    assert manifest_of(made, "siteA", request).privacy is not None


def test_a_lost_checkpoint_costs_another_debit(tmp_path: Path) -> None:
    made = consortium(tmp_path)
    request = interrupted(made)
    home = made.homes["siteA"]
    for path in (home.jobs / request.id).glob("snapshot*"):
        path.unlink()
    train(made, request)
    found = debits(site_ledger(home).entries())
    assert [debit.request for debit in found] == [request.id] * 2
    assert len({debit.attempt for debit in found}) == 2


@pytest.mark.parametrize("harm", ["missing", "edited", "short"])
def test_a_ledger_that_is_not_what_it_was_stops_training(tmp_path: Path, harm: str) -> None:
    made = consortium(tmp_path, training={"rounds": 3})
    home = made.homes["siteA"]

    def spoil(request: Request) -> str | None:
        if (request.site, request.round) == ("siteA", 3):
            data = home.ledger.read_bytes() if home.ledger.exists() else b""
            if harm == "missing":
                home.ledger.unlink(missing_ok=True)
            elif data.count(b"\n") == 2:
                lines = {"edited": data.replace(b'"steps":5', b'"steps":1', 1), "short": data.splitlines(True)[0]}
                home.ledger.write_bytes(lines[harm])
        return None

    with pytest.raises(StateError, match=r"siteA \(ledger\)"):
        made.go(made.port(before=spoil))
    assert {(each.site, each.code) for each in record_of(made, 3).failures} == {("siteA", "ledger")}


def test_a_ledger_that_the_coordinator_knows_to_be_longer_is_refused(tmp_path: Path) -> None:
    made = consortium(tmp_path, training={"rounds": 3})
    home = made.homes["siteA"]
    ledger, anchor = home.ledger.read_bytes(), home.ledger_anchor.read_bytes()

    def roll_back(request: Request) -> str | None:
        if request.site == "siteA" and request.round == 2:
            assert request.ledger is not None and request.ledger.count == 1
            home.ledger.write_bytes(ledger)  # both, as from an older backup
            home.ledger_anchor.write_bytes(anchor)
        return None

    with pytest.raises(StateError, match="ledger"):
        made.go(made.port(before=roll_back))
    assert {each.code for each in record_of(made, 2).failures} == {"ledger"}


@pytest.mark.parametrize(
    ("table", "policy", "word"),
    [
        ({}, POLICY.replace("patients = 60\n", ""), "policy.patients"),
        ({"privacy": {"patients": 40}}, POLICY, "max-rate"),
        ({"privacy": {"sigma": 0.4}}, POLICY, "min-sigma"),
        ({"privacy": {"clip": 11.0}}, POLICY, "max-clip"),
        ({}, POLICY + "max-steps = 4\n", "max-steps"),
        ({"privacy": {"delta": 1e-4}}, POLICY, "policy.delta"),
        ({}, POLICY.replace("min-patients = 20", "min-patients = 61"), "min-patients"),
        ({}, POLICY.replace("1e-3", "9e-3").replace("patients = 60", "patients = 400"), "policy.delta"),
    ],
)
def test_a_plan_outside_the_sites_policy_is_refused_before_training(
    tmp_path: Path, table: dict[str, Any], policy: str, word: str
) -> None:
    made = consortium(tmp_path, policy=policy, **table)
    with pytest.raises(RefusedError) as caught:
        train(made, request_of(made))
    assert caught.value.code == "policy"
    assert word in caught.value.step
    assert site_ledger(made.homes["siteA"]).entries() == []


@pytest.mark.parametrize(
    ("table", "word"),
    [
        ({"model": {"norm": "batch"}}, "model.norm"),
        ({"training": {"mixup": 0.2}}, "mixup"),
        ({"training": {"sampling": "balanced"}}, "sampling"),
        ({"training": {"logit_adjustment": 1.0}}, "logit-adjustment"),
        ({"strategy": {"name": "fedprox", "mu": 0.1}}, "proximal"),
    ],
)
def test_what_mixes_or_counts_patients_is_no_private_plan(table: dict[str, Any], word: str) -> None:
    with pytest.raises(RinError, match=word):
        parse_plan(private_plan(**table))
    with pytest.raises(RinError, match="metrics"):
        parse_plan(private_plan().replace(b"metrics = []\n", b""))
    assert parse_plan(private_plan()).privacy.patients == 6


def test_whoever_agrees_reads_what_protects_the_patients() -> None:
    told = dict(plan_summary(private_plan()))
    assert "differential privacy for each patient" in told["protection"]
    assert "about 6 patients" in told["rounds"] and "images seen" not in told
    assert "epsilon so far" in told["may leave the site"]


def test_the_egress_log_holds_the_claim(tmp_path: Path) -> None:
    made = consortium(tmp_path, training={"rounds": 1})
    made.go()
    line = json.loads(made.homes["siteB"].egress_log.read_text().splitlines()[-1])
    assert line["privacy"]["unit"] == "patient"
    assert line["privacy"]["epsilon"] > 0
    assert line["statement"].startswith(f"({line['privacy']['epsilon']}, 0.001)-differential privacy for each patient")
    assert status(made.homes["siteB"])["budget"]["statement"] in line["statement"]


def test_the_egress_log_says_where_nothing_protects_the_patients(tmp_path: Path) -> None:
    made = small(tmp_path, training={"rounds": 1})
    made.go()
    line = json.loads(made.homes["siteB"].egress_log.read_text().splitlines()[-1])
    assert (line["privacy"], line["statement"]) == (None, UNPROTECTED)
    assert egress.DIGITS == 4 and np.isfinite(line["norm"])
