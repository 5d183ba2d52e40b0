from __future__ import annotations

import threading
from pathlib import Path

import pytest

from rin.common.errors import RefusedError, StateError
from rin.server import members
from rin.server.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    members.create(run)
    return run


def add(run: RunDir, site: str, digit: str) -> members.Member:
    return members.register(run, site, node_key=f"node {digit}", signing_key=digit * 64)


def test_members_are_listed_by_name_with_rising_serials(run: RunDir) -> None:
    assert [add(run, site, digit).serial for site, digit in (("b", "1"), ("a", "2"), ("c", "3"))] == [1, 2, 3]
    assert list(members.members(run)) == ["a", "b", "c"]
    assert members.member(run, "a").signing_key == "2" * 64
    with pytest.raises(RefusedError) as refused:
        members.member(run, "A")
    assert refused.value.code == "update-stranger"


def test_the_same_keys_again_change_nothing(run: RunDir) -> None:
    first = add(run, "a", "1")
    before = run.members.read_bytes()
    assert add(run, "a", "1") == first and run.members.read_bytes() == before


def test_new_keys_replace_the_old_for_good(run: RunDir) -> None:
    add(run, "a", "1")
    assert add(run, "a", "2").serial == 2
    with pytest.raises(RefusedError, match="revoked or replaced"):
        add(run, "a", "1")
    assert members.member(run, "a").signing_key == "2" * 64


def test_a_struck_site_is_a_stranger_until_it_has_new_keys(run: RunDir) -> None:
    add(run, "a", "1")
    members.strike(run, "a")
    assert members.members(run) == {}
    with pytest.raises(StateError, match="not a member"):
        members.strike(run, "a")
    for site in ("a", "b"):
        with pytest.raises(RefusedError):
            add(run, site, "1")
    assert add(run, "a", "2").serial == 2


def test_two_sites_never_share_a_key(run: RunDir) -> None:
    add(run, "a", "1")
    with pytest.raises(RefusedError, match="are a's"):
        members.register(run, "b", node_key="node 1", signing_key="2" * 64)
    with pytest.raises(RefusedError, match="are a's"):
        members.register(run, "b", node_key="node 2", signing_key="1" * 64)


def test_admissions_at_once_are_all_kept(run: RunDir) -> None:
    threads = [threading.Thread(target=add, args=(run, f"s{digit}", digit)) for digit in "0123456789abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(member.serial for member in members.members(run).values()) == list(range(1, 17))


@pytest.mark.parametrize("text", ["{}}", '{"members": {"a": {}}}', '{"serial": 1, "more": 2}', "[]"])
def test_a_damaged_list_stops_everything(run: RunDir, text: str) -> None:
    run.members.write_text(text)
    with pytest.raises(StateError):
        members.members(run)
