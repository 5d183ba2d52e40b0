"""Events: appended whole, read back, half lines skipped."""

import threading
from pathlib import Path

import pytest

from rin.common.events import Events, read_events


def test_what_is_added_is_read_back_from_where_the_last_read_ended(tmp_path: Path) -> None:
    path = tmp_path / "log" / "events.jsonl"
    events = Events(path)
    events.add("round-opened", round=1, sites=["siteA", "siteB"])
    first, offset = read_events(path)
    events.add("receipt", round=1, site="siteA")
    second, end = read_events(path, offset)
    assert [e.kind for e in first] == ["round-opened"]
    assert first[0].fields == {"round": 1, "sites": ["siteA", "siteB"]}
    assert [e.fields["site"] for e in second] == ["siteA"]
    assert end == path.stat().st_size
    assert read_events(tmp_path / "none", 0) == ([], 0)


def test_an_unknown_kind_and_a_missing_field_are_refused(tmp_path: Path) -> None:
    events = Events(tmp_path / "e.jsonl")
    with pytest.raises(ValueError, match="no kind"):
        events.add("coffee")
    with pytest.raises(ValueError, match="site"):
        events.add("receipt", round=1)
    assert not (tmp_path / "e.jsonl").exists()


def test_half_a_line_is_waited_for_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    events = Events(path)
    events.add("receipt", round=1, site="a")
    with path.open("ab") as file:
        file.write(b'{"time": "x", "ki')
    seen, offset = read_events(path)
    assert len(seen) == 1
    events.add("receipt", round=1, site="b")
    assert [e.fields["site"] for e in read_events(path, offset)[0]] == ["b"]


def test_two_threads_and_a_process_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.touch()

    def write(site: str) -> None:
        for number in range(100):
            Events(path).add("receipt", round=number, site=site)

    threads = [threading.Thread(target=write, args=(f"s{i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events, _ = read_events(path)
    assert len(events) == 300
    assert {e.fields["site"] for e in events} == {"s0", "s1", "s2"}
