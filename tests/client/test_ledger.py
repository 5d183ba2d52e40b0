"""The site's own ledger: made once with the key, never made again, read run by run; and its commands."""

from __future__ import annotations

import json
import logging
import re
import secrets
import shutil
import sqlite3
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from rin.client.cli import app
from rin.client.home import Home
from rin.client.ingest.pipeline import ingest
from rin.client.ingest.pseudonyms import site_pseudonyms
from rin.client.ledger import Spent, by_run, site_ledger
from rin.client.ledger_cli import _up
from rin.common.errors import ConfigError, RinError, StateError
from rin.common.ledger import Debit, Entry, Head, LedgerError

ONE, TWO = "1a" * 16, "2b" * 16


def debit(run: str = ONE, round: int = 1, sigma: float = 1.0, delta: float = 1e-5) -> Debit:
    return Debit(
        run=run,
        round=round,
        plan="0" * 64,
        request="1" * 64,
        attempt=secrets.token_hex(16),
        sigma=sigma,
        rate=0.01,
        steps=100,
        clip=1.0,
        images=4,
        patients=1000,
        delta=delta,
        release="0.1.0",
    )


def spend(home: Home, *what: Debit) -> Entry:
    ledger = site_ledger(home)
    return [ledger.debit(each, lambda entries: None) for each in what][-1]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home that has ingested an archive without a file."""
    archive = tmp_path / "archive"
    archive.mkdir()
    found = Home(tmp_path / "home")
    again(found)
    return found


def again(home: Home) -> None:
    ingest(home, site="siteA", roots=[home.root.parent / "archive"], workers=1)


def command(home: Home, *words: str) -> Result:
    done = CliRunner().invoke(app, ["ledger", *words, "--home", str(home.root)])
    if isinstance(done.exception, RinError):
        raise done.exception
    return done


# --- whose it is, and when it is made


def test_ingest_makes_key_and_ledger_together(home: Home) -> None:
    ledger = site_ledger(home)
    assert ledger.entries() == []
    assert ledger.population == site_pseudonyms(home.pseudonym_key, create=False).id
    assert home.ledger_anchor.parent == home.keys != home.ledger.parent


def test_a_lost_ledger_is_not_made_again(home: Home) -> None:
    spend(home, debit())
    home.ledger.unlink()
    home.ledger_anchor.unlink()
    again(home)
    with pytest.raises(LedgerError) as caught:
        site_ledger(home).entries()
    assert not home.ledger.exists() and caught.value.code == "ledger"


def test_a_home_of_an_earlier_release_gets_its_ledger_and_hears_of_it(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    home.ledger.unlink()
    home.ledger_anchor.unlink()
    db = sqlite3.connect(home.catalog)
    with db:
        db.execute("DELETE FROM meta WHERE key = 'ledger'")
    db.close()
    with caplog.at_level(logging.WARNING):
        again(home)
    assert site_ledger(home).entries() == [] and "earlier release" in caplog.text
    caplog.clear()
    again(home)
    assert not caplog.text


def test_a_new_key_is_another_population(home: Home) -> None:
    home.pseudonym_key.unlink()
    home.catalog.unlink()
    shutil.rmtree(home.cache, ignore_errors=True)
    again(home)
    with pytest.raises(LedgerError, match="another population"):
        site_ledger(home).entries()


def test_the_id_of_a_key_is_what_the_catalog_is_tied_to(home: Home) -> None:
    db = sqlite3.connect(home.catalog)
    (tied,) = db.execute("SELECT value FROM meta WHERE key = 'key'").fetchone()
    db.close()
    assert tied == site_ledger(home).population


def test_debits_are_added_up_by_run() -> None:
    spent = by_run([debit(), debit(TWO), debit(round=2), debit(round=2), debit(round=3, sigma=2.0)])
    assert spent == [
        Spent(ONE, rounds=2, debits=3, sigma=1.0, rate=0.01, steps=300),
        Spent(TWO, rounds=1, debits=1, sigma=1.0, rate=0.01, steps=100),
        Spent(ONE, rounds=1, debits=1, sigma=2.0, rate=0.01, steps=100),
    ]


# --- the commands


def test_an_empty_ledger_is_shown(home: Home) -> None:
    assert "nothing was trained privately" in command(home, "show").output
    facts = json.loads(command(home, "show", "--json").output)
    assert facts["epsilon"] == 0 and facts["runs"] == [] and facts["head"].startswith("0:")


def test_epsilon_is_that_of_all_runs_together_at_the_strictest_delta(home: Home) -> None:
    from rin.common.accountant import Row, epsilon

    last = spend(home, debit(), debit(round=2), debit(TWO, sigma=2.0, delta=1e-6))
    facts = json.loads(command(home, "show", "--json").output)
    assert facts["head"] == str(last.head) and facts["delta"] == 1e-6
    assert facts["epsilon"] == epsilon([Row(1.0, 0.01, 200), Row(2.0, 0.01, 100)], 1e-6)
    alone = [row["epsilon"] for row in facts["runs"]]
    assert [row["steps"] for row in facts["runs"]] == [200, 100]
    assert max(alone) < facts["epsilon"] < sum(alone)
    text = command(home, "show").output
    assert "at delta 1e-06, for one patient" in text and ONE[:8] in text and TWO[:8] in text
    (said,) = re.findall(r"epsilon so far: (\S+) at", text)
    assert facts["epsilon"] <= float(said) < facts["epsilon"] + 0.001


def test_epsilon_is_said_rounded_up() -> None:
    assert [_up(each) for each in (1.2340001, 1.234, 0.0, 0.00001)] == ["1.235", "1.234", "0.000", "0.001"]


def test_the_sites_ceiling_and_epsilon_at_its_own_delta_are_shown(home: Home) -> None:
    from rin.common.accountant import Row, epsilon

    spend(home, debit())
    assert "ceiling: not known" in command(home, "show").output
    assert json.loads(command(home, "show", "--json").output)["policy"] is None
    home.site_toml.write_text('site = "siteA"\n[policy]\nepsilon = 4.5\ndelta = 1e-5\n')
    assert "ceiling: 4.5 at delta 1e-05\n" in command(home, "show").output
    home.site_toml.write_text('site = "siteA"\n[policy]\nepsilon = 4.5\ndelta = 1e-7\n')
    assert "ceiling: 4.5 at delta 1e-07, where epsilon so far is " in command(home, "show").output
    facts = json.loads(command(home, "show", "--json").output)
    assert facts["delta"] == 1e-5
    assert facts["policy"] == {"ceiling": 4.5, "delta": 1e-7, "epsilon": epsilon([Row(1.0, 0.01, 100)], 1e-7)}


def test_the_head_is_kept_in_a_second_place_and_compared(home: Home, tmp_path: Path) -> None:
    kept = tmp_path / "officer.txt"
    spend(home, debit())
    copy = home.ledger.read_bytes(), home.ledger_anchor.read_bytes()
    spend(home, debit(round=2))
    printed = command(home, "anchor").output.strip()
    command(home, "anchor", "--out", str(kept))
    assert kept.read_text() == f"{printed}\n"
    spend(home, debit(round=3))
    assert "3 entries" in command(home, "verify", "--anchor", str(kept)).output
    assert "3 entries" in command(home, "verify", "--anchor", printed).output
    home.ledger.write_bytes(copy[0])
    home.ledger_anchor.write_bytes(copy[1])
    assert "1 entry\n" in command(home, "verify").output  # by itself an older copy is whole
    for words in (("verify", "--anchor", printed), ("anchor", "--out", str(kept))):
        with pytest.raises(StateError, match="entry 2") as caught:
            command(home, *words)
        assert caught.value.step
    assert kept.read_text() == f"{printed}\n"


@pytest.mark.parametrize("head", ["nowhere", "3:zz", "/dev/null"])
def test_what_is_no_head_is_said(home: Home, head: str) -> None:
    with pytest.raises(ConfigError):
        command(home, "verify", "--anchor", head)


def test_a_head_that_cannot_be_written_is_said(home: Home) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        command(home, "anchor", "--out", "/proc/rin/head")


def test_adopting_settles_the_coordinators_head_and_shows_in_the_ledger(home: Home) -> None:
    spend(home, debit())
    with pytest.raises(StateError, match="nothing is wrong"):
        command(home, "adopt", "--reason", "x")
    with pytest.raises(LedgerError):
        site_ledger(home).require(Head(count=9, digest="9" * 64))
    assert "lower the epsilon ceiling" in command(home, "adopt", "--reason", "new disk, N. N.").output
    site_ledger(home).require(Head(count=9, digest="9" * 64))
    assert "history adopted (head): new disk, N. N." in command(home, "show").output
    (word,) = json.loads(command(home, "show", "--json").output)["adopted"]
    assert word["coordinator"] == {"count": 9, "digest": "9" * 64}


def test_an_edited_ledger_shows_nothing(home: Home) -> None:
    spend(home, debit(), debit(round=2))
    home.ledger.write_bytes(home.ledger.read_bytes().replace(b'"steps":100', b'"steps":1'))
    for words in (("show",), ("verify",), ("anchor",)):
        with pytest.raises(LedgerError, match="edited at line 1 or 2"):
            command(home, *words)


def test_adopting_an_edited_ledger_says_which_lines_are_not_to_be_trusted(home: Home) -> None:
    spend(home, debit(), debit(round=2))
    home.ledger.write_bytes(home.ledger.read_bytes().replace(b'"steps":100', b'"steps":1'))
    said = command(home, "adopt", "--reason", "bad disk, N. N.").output
    assert "edited at line 1 or 2" in said and "as they are written" in said and "lower policy.epsilon" in said
    assert sum(row["steps"] for row in json.loads(command(home, "show", "--json").output)["runs"]) == 2


def test_verify_says_it_for_programs_too(home: Home) -> None:
    head = spend(home, debit()).head
    said = json.loads(command(home, "verify", "--json", "--anchor", str(head)).output)
    assert said == {"whole": True, "entries": 1, "head": str(head), "compared": str(head)}
    home.ledger_anchor.unlink()
    done = CliRunner().invoke(app, ["ledger", "verify", "--json", "--home", str(home.root)])
    assert done.exit_code == 1 and isinstance(done.exception, LedgerError)
    said = json.loads(done.stdout)
    assert said["whole"] is False and "anchor" in said["fault"] and said["next"]


def test_next_steps_name_nothing_that_fails_alike(home: Home) -> None:
    spend(home, debit())
    home.ledger_anchor.unlink()
    with pytest.raises(LedgerError) as caught:
        command(home, "show")
    assert "ledger show" not in caught.value.step and "ledger anchor" not in caught.value.step
    assert "ledger adopt" in caught.value.step and "journal" in caught.value.step
    assert command(home, "adopt", "--reason", "compared, N. N.").exit_code == 0
    home.ledger.unlink()
    with pytest.raises(LedgerError) as caught:
        command(home, "verify")
    assert "ledger adopt" in caught.value.step
    assert command(home, "adopt", "--reason", "no backup, N. N.").exit_code == 0


def test_a_key_that_is_gone_from_its_ledger_is_restored_and_not_made_anew(home: Home) -> None:
    home.pseudonym_key.unlink()
    with pytest.raises(StateError, match="pseudonym key is missing") as caught:
        command(home, "show")
    assert "restore" in caught.value.step and "ingest" not in caught.value.step


def test_a_folder_that_is_no_home_is_said(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="pseudonym"):
        command(Home(tmp_path), "show")
    assert list(tmp_path.iterdir()) == []
