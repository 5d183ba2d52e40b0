"""`rin-client status` on homes in every state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rin.client.home import Home
from rin.client.ingest.catalog import Catalog
from rin.client.status import status
from rin.common.errors import StateError
from rin.common.files import write_json
from rin.common.statement import RISK

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


@pytest.mark.parametrize(("halves", "word"), [((True, True), "enforced"), ((True, False), "by convention")])
def test_the_airlock_is_enforced_only_by_both_halves(tmp_path: Path, halves: tuple[bool, bool], word: str) -> None:
    home = Home(tmp_path)
    write_json(home.net / "agent.json", {"files_hidden": halves[0]})
    write_json(home.vault_log / "airlock.json", {"trainer": halves[1]})
    assert status(home)["airlock"] == word
