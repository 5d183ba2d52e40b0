"""`rin-client status` on homes in every state."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rin.client.home import Home
from rin.client.ingest.catalog import Catalog
from rin.client.ingest.pipeline import ingest
from rin.client.status import status
from rin.common.errors import StateError
from rin.common.files import write_json
from rin.common.statement import RISK
from tests.client.test_ledger import debit, spend

if TYPE_CHECKING:
    from tests.client.conftest import SmallSite


def test_no_home_is_an_error_with_a_next_step(tmp_path: Path) -> None:
    with pytest.raises(StateError) as caught:
        status(Home(tmp_path / "nothing"))
    assert "join" in caught.value.step


def test_an_empty_home_knows_nothing_and_is_left_as_it_was(tmp_path: Path) -> None:
    facts = status(Home(tmp_path))
    assert facts["agent"] == "stopped"
    assert facts["airlock"] is None
    assert set(facts["catalog"].values()) == {None}
    assert list(tmp_path.iterdir()) == []


def test_counts_and_the_last_round_of_a_stopped_site(small_site: Callable[..., SmallSite]) -> None:
    home = small_site(patients=5).home
    write_json(home.root / "vault" / "status.json", {"state": "training", "round": 3, "step": 5, "time": "t"})
    facts = status(home)
    counts = {"images": 10, "patients": 5, "files_refused": 0}
    assert facts["catalog"] == counts | dict.fromkeys(("images_gone", "patients_gone", "images_to_erase"), 0)
    assert facts["trainer"] == {"state": "stopped", "round": 3, "time": "t"}
    json.dumps(facts)


def test_the_catalog_knows_the_site_of_a_home_that_never_joined(small_site: Callable[..., SmallSite]) -> None:
    home = small_site(patients=1).home
    assert status(home)["site"] is None
    catalog = Catalog(home.catalog)
    catalog.set_meta("site", "siteA")
    catalog.commit()
    catalog.close()
    assert status(home)["site"] == "siteA"
    write_json(home.net / "coordinator.json", {"site": "joined"})
    assert status(home)["site"] == "joined"


def test_a_damaged_catalog_is_said_with_what_helps(small_site: Callable[..., SmallSite]) -> None:
    home = small_site(patients=1).home
    home.catalog.write_bytes(b"no database at all" * 300)
    facts = status(home)["catalog"]
    assert (facts["images"], facts["fault"]) == (None, "catalog.sqlite is damaged")
    assert "restore" in facts["next"]


def test_what_protects_the_patients_is_said_in_words(small_site: Callable[..., SmallSite]) -> None:
    home = small_site(patients=0).home
    said = status(home)["protection"]
    assert said.startswith("not required, as a test agreed on 2026-11-23") and said.endswith(RISK)
    home.site_toml.write_text('site = "siteA"\n')
    assert status(home)["protection"].startswith("required: ")
    home.site_toml.write_text("site = 5\n")
    assert status(home)["protection"] is None


BUDGET = {"epsilon": 1.5, "delta": 1e-6, "entries": 1, "ceiling": 3.0, "rounds_left": 7, "statement": "So it is."}
POLICY = 'site = "siteA"\n[policy]\n'


@pytest.fixture
def spent(tmp_path: Path) -> Home:
    """A home with one debit in its ledger, and what its round wrote down for status."""
    (tmp_path / "archive").mkdir()
    home = Home(tmp_path / "home")
    ingest(home, site="siteA", roots=[tmp_path / "archive"], workers=1)
    home.site_toml.write_text(POLICY)
    assert status(home)["budget"] is None  # an empty ledger has nothing to say
    spend(home, debit())
    write_json(home.budget, BUDGET)
    return home


def test_a_budget_that_is_the_ledgers_is_shown_with_its_sentence(spent: Home) -> None:
    assert status(spent)["budget"] == BUDGET | {"ledger_entries": 1, "stale": False}


def test_a_budget_of_an_earlier_entry_is_said_to_be_one(spent: Home) -> None:
    spend(spent, debit(round=2))
    said = status(spent)["budget"]
    assert said["stale"] and (said["entries"], said["ledger_entries"]) == (1, 2)
    assert "statement" not in said and "rounds_left" not in said
    assert "that of entry 1, and 2 are in the ledger now" in said["warning"] and "ledger show" in said["next"]
    spent.budget.unlink()
    said = status(spent)["budget"]
    assert said["stale"] and said["epsilon"] is None and "not known" in said["warning"]


def test_ceiling_and_delta_are_those_of_site_toml_now(spent: Home) -> None:
    spent.site_toml.write_text(f"{POLICY}epsilon = 2.0\n")
    said = status(spent)["budget"]
    assert said["ceiling"] == 2.0 and "rounds_left" not in said and "warning" not in said
    spent.site_toml.write_text(f"{POLICY}delta = 1e-7\n")
    said = status(spent)["budget"]
    assert "at delta 1e-06, site.toml says 1e-07 now" in said["warning"] and not said["stale"]
    spent.site_toml.write_text("site = 5\n")
    assert status(spent)["budget"]["ceiling"] is None


def test_a_broken_ledger_is_said_in_place_of_the_budget(spent: Home) -> None:
    whole = spent.ledger.read_bytes()
    for fault, data in (("edited at line 1", whole.replace(b'"steps":100', b'"steps":1')), ("rolled back", b"")):
        spent.ledger.write_bytes(data)
        said = status(spent)["budget"]
        assert fault in said["fault"] and said["next"] and said["stale"] and "statement" not in said
    spent.ledger.write_bytes(whole)
    spent.pseudonym_key.unlink()
    said = status(spent)["budget"]
    assert "pseudonym" in said["fault"] and "restore" in said["next"]


def test_status_imports_no_torch() -> None:
    code = "import sys, rin.client.status; sys.exit(bool({'torch', 'opacus'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("halves", "word"), [((True, True), "enforced"), ((True, False), "by convention")])
def test_the_airlock_is_enforced_only_by_both_halves(tmp_path: Path, halves: tuple[bool, bool], word: str) -> None:
    home = Home(tmp_path)
    write_json(home.net / "agent.json", {"files_hidden": halves[0]})
    write_json(home.vault_log / "airlock.json", {"trainer": halves[1]})
    assert status(home)["airlock"] == word
