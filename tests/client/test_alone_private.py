"""Private plans in training alone: one debit a round, the site's own limits on privacy, and what is then claimed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rin.client import alone
from rin.client.home import Home
from rin.client.ledger import site_ledger
from rin.client.parallel import SNAPSHOT
from rin.client.private import claim
from rin.client.site import read_site
from rin.client.status import status
from rin.common import snapshots
from rin.common.chain import Debit, LedgerError
from rin.common.errors import RefusedError, StateError
from rin.common.files import read_json, write_json
from rin.common.ledger import debits
from rin.common.plan import plan_digest
from rin.common.statement import facts as statement_of
from rin.common.weights import read_facts
from rin.server import export
from tests.private_consortium import POLICY, consortium, private_plan


def home_of(folder: Path, policy: str = POLICY) -> Home:
    """A site that has ingested and declared its patients, and that has accepted nothing."""
    home = consortium(folder / "sites", policy=policy).homes["siteA"]
    shutil.rmtree(home.accepted)
    return home


def spent(home: Home) -> list[Debit]:
    return debits(site_ledger(home).entries())


def stop(home: Home, data: bytes, out: Path, at: int) -> None:
    """Train until `at` steps of all rounds are done."""
    done = [0]
    with pytest.raises(RefusedError, match="cancelled"):
        alone.train(
            home,
            data,
            out,
            progress=lambda step, _: done.append(step),
            cancelled=lambda: "cancelled" if done[-1] >= at else "",
        )


@pytest.mark.usefixtures("tiny")
def test_three_rounds_are_three_debits_and_the_checkpoint_carries_the_claim(tmp_path: Path) -> None:
    home, data, lines = home_of(tmp_path), private_plan(training={"rounds": 3}), list[dict[str, Any]]()
    last = alone.train(home, data, tmp_path / "out", on_round=lines.append)
    found = spent(home)
    assert [(each.round, each.steps, each.rate) for each in found] == [(n, 5, 0.1) for n in (1, 2, 3)]
    assert {(each.run, each.plan) for each in found} == {
        (read_json(tmp_path / "out" / "train.json")["run"], plan_digest(data))
    }
    assert len({each.request for each in found}) == len({each.attempt for each in found}) == 3
    said, facts = claim(site_ledger(home), read_site(home)), read_facts(last)
    assert {key: facts[key] for key in ("privacy", "privacy_sites")} == statement_of({"siteA": said})
    assert (facts["privacy_mode"], facts["site"], facts["updates"]) == ("patient", "siteA", {})
    assert status(home)["budget"]["epsilon"] == said.epsilon == lines[2]["epsilon"]
    start = read_facts(tmp_path / "out" / "checkpoints" / "round-0000.safetensors")
    assert "no patient's image has had a part" in start["privacy"]
    assert not list(home.alone.glob("*/"))  # nothing of a finished training stays in the vault
    assert not home.egress_log.exists()


@pytest.mark.usefixtures("tiny")
def test_no_figure_but_what_the_ledger_came_to_is_written(tmp_path: Path) -> None:
    home = home_of(tmp_path)
    alone.train(home, private_plan(), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "figures.jsonl").read_text().splitlines()]
    assert [line.keys() for line in lines] == [{"round", "epsilon", "delta"}] * 2
    assert 0 < lines[0]["epsilon"] < lines[1]["epsilon"]
    assert not list((tmp_path / "out").rglob("trained.json"))


@pytest.mark.usefixtures("tiny")
def test_a_round_that_was_stopped_goes_on_inside_its_debit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "EVERY", 0.0)
    home, data, out, seen = home_of(tmp_path), private_plan(), tmp_path / "out", list[int]()
    stop(home, data, out, 3)
    stop(home, data, out, 8)
    assert [each.round for each in spent(home)] == [1, 2]
    alone.train(home, data, out, progress=lambda step, _: seen.append(step))
    assert seen == [9, 10]  # of the second round, which had come to step 8
    assert [each.round for each in spent(home)] == [1, 2]


@pytest.mark.usefixtures("tiny")
def test_a_copy_of_the_folder_or_an_older_one_put_back_goes_through_no_debit_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "EVERY", 0.0)
    home, data = home_of(tmp_path), private_plan(training={"rounds": 1})
    stop(home, data, tmp_path / "out", 3)
    assert not list((tmp_path / "out").rglob(f"*{SNAPSHOT}"))
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    first = alone.train(home, data, tmp_path / "out")
    second = alone.train(home, data, tmp_path / "copy")
    assert first.read_bytes() != second.read_bytes()
    found = spent(home)
    assert len({each.request for each in found}) == 1
    assert len({each.attempt for each in found}) == len(found) == 2


@pytest.mark.usefixtures("tiny")
def test_two_folders_of_one_plan_pay_for_themselves(tmp_path: Path) -> None:
    home, data = home_of(tmp_path), private_plan(training={"rounds": 1})
    for name in ("one", "two"):
        alone.train(home, data, tmp_path / name)
    assert len({(each.run, each.request) for each in spent(home)}) == 2


@pytest.mark.usefixtures("tiny")
def test_the_round_that_would_cross_the_ceiling_is_refused_before_its_first_step(tmp_path: Path) -> None:
    home, data, out, steps = home_of(tmp_path), private_plan(), tmp_path / "out", list[int]()
    alone.train(home, private_plan(training={"rounds": 1}), tmp_path / "first")
    one = claim(site_ledger(home), read_site(home)).epsilon
    text = home.site_toml.read_text()
    home.site_toml.write_text(text.replace("epsilon = 50.0", f"epsilon = {one * 1.01}"))
    with pytest.raises(RefusedError) as caught:
        alone.train(home, data, out, progress=lambda step, _: steps.append(step))
    assert caught.value.code == "budget"
    assert "policy.epsilon" in str(caught.value) and "rin-client ledger show" in caught.value.step
    assert steps == [] and len(spent(home)) == 1
    home.site_toml.write_text(text)
    alone.train(home, data, out)
    assert [each.round for each in spent(home)] == [1, 1, 2]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("table", "policy", "word"),
    [
        ({}, POLICY.replace("patients = 60\n", ""), "policy.patients"),
        ({"privacy": {"patients": 40}}, POLICY, "max-rate"),
        ({"privacy": {"sigma": 0.4}}, POLICY, "min-sigma"),
        ({"privacy": {"clip": 11.0}}, POLICY, "max-clip"),
        ({}, POLICY + "max-steps = 4\n", "max-steps"),
        ({"privacy": {"delta": 1e-4}}, POLICY, "policy.delta"),
    ],
)
def test_what_the_site_says_of_privacy_holds_here_too(
    tmp_path: Path, table: dict[str, Any], policy: str, word: str
) -> None:
    home = home_of(tmp_path, policy)
    with pytest.raises(RefusedError) as caught:
        alone.train(home, private_plan(**table), tmp_path / "out")
    assert caught.value.code == "policy"
    assert word in caught.value.step
    assert spent(home) == [] and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tiny")
def test_the_rest_of_the_policy_is_in_nobodys_way(tmp_path: Path) -> None:
    policy = POLICY.replace("min-patients = 20", "min-patients = 1000") + "max-rounds = 1\nmin-sites = 9\n"
    assert alone.train(home_of(tmp_path, policy), private_plan(), tmp_path / "out").exists()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("harm", ["missing", "edited"])
def test_a_ledger_that_is_not_what_it_was_stops_training_and_says_what_to_do(tmp_path: Path, harm: str) -> None:
    home, data, out = home_of(tmp_path), private_plan(), tmp_path / "out"
    stop(home, data, out, 5)
    if harm == "missing":
        home.ledger.unlink()
    else:
        home.ledger.write_bytes(home.ledger.read_bytes().replace(b'"steps":5', b'"steps":1'))
    with pytest.raises(LedgerError) as caught:
        alone.train(home, data, out)
    assert caught.value.fault == harm
    assert "restore its newest backup" in caught.value.step


@pytest.mark.usefixtures("tiny")
def test_a_checkpoint_over_a_ledger_that_a_person_took_over_says_so(tmp_path: Path) -> None:
    home, data, out = home_of(tmp_path), private_plan(), tmp_path / "out"
    stop(home, data, out, 6)  # a finished round, and one that is debited
    home.ledger.unlink()
    site_ledger(home).adopt("the disk is lost")
    facts = read_facts(alone.train(home, data, out))
    assert facts["privacy_sites"]["siteA"]["adopted"] == 1
    assert "took that ledger over as it was found, 1 times in all" in facts["privacy"]


@pytest.mark.usefixtures("tiny")
def test_a_folder_whose_run_is_not_known_is_not_gone_on_with(tmp_path: Path) -> None:
    home, data, out = home_of(tmp_path), private_plan(), tmp_path / "out"
    stop(home, data, out, 3)
    facts = read_json(out / "train.json")
    for run in ({}, {"run": "../../keys"}):
        write_json(out / "train.json", {**{k: v for k, v in facts.items() if k != "run"}, **run})
        with pytest.raises(StateError, match="which run its debits name"):
            alone.train(home, data, out)
    last = out / "checkpoints" / "round-0001.safetensors"
    write_json(out / "train.json", facts)
    stop(home, data, out, 7)
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(StateError) as caught:
        alone.train(home, data, out)
    assert "trains round 1 again, for another debit" in caught.value.step


@pytest.mark.usefixtures("tiny")
def test_an_export_of_it_says_what_is_claimed(tmp_path: Path) -> None:
    home = home_of(tmp_path)
    last = alone.train(home, private_plan(), tmp_path / "out")
    made = export.export(last, tmp_path / "export", name="mine")
    said = read_facts(last)
    card, facts = (made.folder / "README.md").read_text(), read_json(made.folder / "mine.json")
    assert "differential privacy for each patient" in card and "Not covered" in card
    claim = said["privacy_sites"]["siteA"]
    assert f"| siteA | patient | {claim['epsilon']} | 0.001 | {claim['mechanism']} | prv |" in card
    assert "`privacy_sites` in mine.json" in card
    assert facts["privacy"] == said["privacy"] and facts["privacy_sites"] == said["privacy_sites"]
    assert read_facts(made.folder / "mine.safetensors")["privacy_sites"] == said["privacy_sites"]


@pytest.mark.slow
def test_kill_9_after_the_debit_costs_no_second_one(tmp_path: Path) -> None:
    home, data = home_of(tmp_path), private_plan(training={"rounds": 1, "local_steps": 8})
    (tmp_path / "plan.toml").write_bytes(data)
    command = [sys.executable, "-m", "rin.client.cli", "train", "--home", str(home.root), "--json"]
    command += ["--plan", str(tmp_path / "plan.toml"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not home.ledger.stat().st_size and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "checkpoints" / "round-0001.safetensors").exists()
    assert len(spent(home)) == 1
    last = alone.train(home, data, tmp_path / "out")
    assert len(spent(home)) == 1
    assert "differential privacy for each patient" in read_facts(last)["privacy"]
