from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rin.common.errors import RefusedError, StateError
from rin.common.keys import sha256
from rin.server import members, tickets
from rin.server.rundir import RunDir

PLAN, BASE = "a" * 64, "b" * 64


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    members.create(run)
    for site, digit in (("siteA", "1"), ("siteB", "2")):
        members.register(run, site, node_key=digit, signing_key=digit * 64)
    return run


def issue(run: RunDir, number: int, site: str, base: str = BASE) -> str:
    return tickets.issue(run, number, site, plan=PLAN, base=base)


def code(run: RunDir, token: str) -> str:
    with pytest.raises(RefusedError) as refused:
        tickets.check(run, token)
    return refused.value.code


def test_a_ticket_opens_one_sites_part_of_one_round(run: RunDir) -> None:
    first, second, other = issue(run, 1, "siteA"), issue(run, 1, "siteB"), issue(run, 12, "siteA", "c" * 64)
    grants = [tickets.check(run, token) for token in (first, second, other)]
    assert [(grant.round, grant.site, grant.base) for grant in grants] == [
        (1, "siteA", BASE),
        (1, "siteB", BASE),
        (12, "siteA", "c" * 64),
    ]
    assert all(grant.plan == PLAN for grant in grants) and len({grant.ticket for grant in grants}) == 3


def test_a_restarted_coordinator_issues_beside_the_old(run: RunDir) -> None:
    old, new = issue(run, 1, "siteA"), issue(run, 1, "siteA")
    assert old != new and tickets.check(run, old).site == tickets.check(run, new).site == "siteA"


def test_only_hashes_are_on_disk_for_the_owner(run: RunDir) -> None:
    token = issue(run, 1, "siteA")
    path = run.round(1) / "tickets.json"
    text = path.read_text()
    assert token not in text and token.split(".")[1] not in text and sha256(token.encode()) in text
    assert path.stat().st_mode & 0o777 == 0o600 and len(token.split(".")[1]) == 43


def test_a_closed_round_is_late_and_takes_no_new_ticket(run: RunDir) -> None:
    token, part = issue(run, 1, "siteA"), run.receipts(1) / ".siteA.x.y.part"
    part.parent.mkdir()
    part.write_bytes(b"half")
    tickets.close(run, 1)
    tickets.close(run, 1)
    tickets.close(run, 7)  # had none
    assert code(run, token) == "update-late" and not part.exists()
    with pytest.raises(StateError, match="closed"):
        issue(run, 1, "siteA")
    assert tickets.open_rounds(run) == []


def test_void_takes_one_sites_tickets_in_every_open_round(run: RunDir) -> None:
    mine = [issue(run, number, "siteA") for number in (1, 2)]
    theirs = [issue(run, number, "siteB") for number in (1, 2)]
    tickets.close(run, 1)
    assert tickets.void(run, "siteA") == [2]
    assert code(run, mine[0]) == "update-late" and code(run, mine[1]) == "update-stranger"
    assert tickets.check(run, theirs[1]).site == "siteB"


def test_a_revoked_sites_ticket_opens_nothing_even_if_it_was_not_voided(run: RunDir) -> None:
    token = issue(run, 1, "siteA")
    members.strike(run, "siteA")
    assert code(run, token) == "update-stranger"


def test_a_round_has_one_base_and_one_plan(run: RunDir) -> None:
    issue(run, 1, "siteA")
    with pytest.raises(StateError, match="another plan or other weights"):
        issue(run, 1, "siteA", "c" * 64)
    with pytest.raises(StateError):
        tickets.issue(run, 1, "siteA", plan="c" * 64, base=BASE)


def test_a_token_of_one_round_is_none_of_another(run: RunDir) -> None:
    token = issue(run, 1, "siteA")
    issue(run, 2, "siteA")
    assert code(run, "2" + token[1:]) == "update-stranger"
    assert code(run, "3" + token[1:]) == "update-stranger"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(token=st.text(max_size=60) | st.from_regex(r"[0-9]{1,7}\.[A-Za-z0-9_-]{43}", fullmatch=True))
def test_no_guess_opens_anything(run: RunDir, token: str) -> None:
    if not (run.round(1) / "tickets.json").exists():
        issue(run, 1, "siteA")
    assert code(run, token) == "update-stranger"


def test_a_damaged_file_is_said(run: RunDir) -> None:
    token = issue(run, 1, "siteA")
    path = run.round(1) / "tickets.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "ajar"}))
    with pytest.raises(StateError, match="damaged"):
        tickets.check(run, token)
