"""The ledger on real files: what was acknowledged stays, whatever dies, and whatever was done to it is found."""

from __future__ import annotations

import functools
import itertools
import secrets
import stat
import syslog
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rin.common.chain import FAULTS, HELPLESS, START, Anchor, rechain
from rin.common.errors import ConfigError, RefusedError, StateError
from rin.common.ledger import Adopt, Debit, Entry, Head, Ledger, LedgerError, debits

POPULATION = "ab" * 16
FACTS: dict[str, Any] = {
    "run": "cd" * 16,
    "round": 1,
    "plan": "0" * 64,
    "request": "1" * 64,
    "sigma": 1.1,
    "rate": 0.02,
    "steps": 50,
    "clip": 1.0,
    "images": 4,
    "patients": 1000,
    "delta": 1e-5,
    "release": "0.1.0",
}


def debit(**changes: Any) -> Debit:
    return Debit.model_validate(FACTS | {"attempt": secrets.token_hex(16)} | changes)


def anything(entries: Sequence[Entry]) -> None:
    """Every debit is allowed."""


def at(folder: Path, population: str = POPULATION) -> Ledger:
    return Ledger(folder / "ledger.jsonl", folder / "keys" / "ledger.anchor", population)


def filled(folder: Path, count: int) -> Ledger:
    ledger = at(folder)
    assert ledger.create()
    for number in range(1, count + 1):
        ledger.debit(debit(round=number), anything)
    return ledger


def fault(ledger: Ledger) -> str:
    """The fault that every use of the ledger meets alike."""
    found = []
    for use in (ledger.entries, lambda: ledger.head, lambda: ledger.debit(debit(), anything)):
        with pytest.raises(LedgerError) as caught:
            use()
        assert caught.value.code == "ledger" and caught.value.step and "{" not in str(caught.value)
        found.append(caught.value.fault)
    assert len(set(found)) == 1
    return found[0]


# --- what it keeps


def test_a_debit_is_kept_as_it_was_and_in_order(tmp_path: Path) -> None:
    ledger, wanted = filled(tmp_path, 0), [debit(round=1), debit(round=2, sigma=2), debit(round=2)]
    assert ledger.head == START
    for number, each in enumerate(wanted, 1):
        entry = ledger.debit(each, anything)
        assert (entry.number, entry.payload) == (number, each)
        assert ledger.head == entry.head
    assert debits(at(tmp_path).entries()) == wanted
    assert [entry.number for entry in ledger.entries()] == [1, 2, 3]


def test_files_belong_to_their_owner_alone(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 2)
    for path in (ledger.path, ledger.anchor):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_ledger_is_made_once(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 1)
    before = ledger.path.read_bytes()
    assert not ledger.create() and ledger.path.read_bytes() == before
    ledger.path.unlink()
    assert not ledger.create() and fault(ledger) == "missing"  # the anchor knows that there was one


def test_a_creation_that_was_interrupted_is_completed(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 0)
    ledger.path.unlink()  # killed between anchor and ledger
    assert ledger.create() and ledger.entries() == []


def test_a_debit_that_is_not_allowed_leaves_no_trace(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 2)
    before = ledger.path.read_bytes()

    def never(entries: Sequence[Entry]) -> None:
        assert len(debits(entries)) == 2
        raise RefusedError("budget")

    with pytest.raises(RefusedError) as caught:
        ledger.debit(debit(), never)
    assert caught.value.code == "budget" and ledger.path.read_bytes() == before


def test_one_attempt_is_debited_once(tmp_path: Path) -> None:
    ledger, one = filled(tmp_path, 1), debit()
    ledger.debit(one, anything)
    with pytest.raises(RefusedError, match="attempt"):
        ledger.debit(one, anything)
    assert ledger.head.count == 2


@pytest.mark.parametrize(
    "change",
    [
        {"sigma": 0.0},
        {"sigma": 0.1},
        {"sigma": float("nan")},
        {"sigma": float("inf")},
        {"rate": 0.0},
        {"rate": 1.5},
        {"steps": 0},
        {"steps": True},
        {"steps": 2.0},
        {"clip": 0.0},
        {"images": 0},
        {"patients": 0},
        {"delta": 0.0},
        {"delta": 1.0},
        {"attempt": "x"},
        {"mechanism": "none"},
        {"name": "a patient"},
    ],
)
def test_no_debit_outside_its_ranges(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        debit(**change)


def test_the_journal_gets_number_and_hash_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(syslog, "syslog", lambda level, text: lines.append(text))
    ledger = filled(tmp_path, 1)
    assert lines == [f"rin privacy ledger: 1 entries, head {ledger.head.digest}"]


# --- what is found


@functools.cache
def history(count: int = 3) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """The lines of a ledger with their newlines, and the anchor at each step: settled, then with a line on its way."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = filled(Path(folder), 0)
        anchors = [ledger.anchor.read_bytes()]
        for number in range(count):
            before = ledger.head
            entry = ledger.debit(debit(round=number + 1), anything)
            line = ledger.path.read_bytes().splitlines()[-1].decode()
            on_its_way = Anchor(population=POPULATION, head=before, line=line, digest=entry.digest)
            anchors += [on_its_way.to_bytes(), ledger.anchor.read_bytes()]
        return tuple(ledger.path.read_bytes().splitlines(keepends=True)), tuple(anchors)


@contextmanager
def written(data: bytes, anchor: bytes) -> Iterator[Ledger]:
    with tempfile.TemporaryDirectory() as folder:
        ledger = at(Path(folder))
        ledger.anchor.parent.mkdir()
        ledger.path.write_bytes(data)
        ledger.anchor.write_bytes(anchor)
        yield ledger


def states() -> Iterator[tuple[int, bytes, bytes]]:
    """Every state that a ledger goes through: entries that count, ledger, anchor; lines in four lengths."""
    lines, anchors = history()
    for step, anchor in enumerate(anchors):
        whole = b"".join(lines[: step // 2])
        if step % 2 == 0:
            yield step // 2, whole, anchor
        else:
            line = lines[step // 2]
            for length in (0, 1, len(line) - 1, len(line)):
                yield step // 2 + 1, whole + line[:length], anchor


def test_a_kill_at_any_moment_leaves_a_ledger_that_goes_on() -> None:
    for count, data, anchor in states():
        with written(data, anchor) as ledger:
            assert len(ledger.entries()) == count  # read as it stands
            assert ledger.path.read_bytes() == data
            ledger.debit(debit(), anything)
            assert len(ledger.entries()) == count + 1
            assert ledger.path.read_bytes().startswith(b"".join(history()[0][:count]))


def test_only_what_was_written_together_fits_together() -> None:
    """An older copy of the ledger, of the anchor, of a state in the middle of a write: all pairs are tried."""
    every = list(states())
    fitting = {(data, anchor) for _, data, anchor in every}
    for data, anchor in itertools.product({data for _, data, _ in every}, {anchor for *_, anchor in every}):
        with written(data, anchor) as ledger:
            if (data, anchor) in fitting:
                ledger.entries()
            else:
                assert fault(ledger) in ("short", "long", "edited")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_flipped_byte_is_found(draw: st.DataObject) -> None:
    _, data, anchor = draw.draw(st.sampled_from(list(states())))
    place = draw.draw(st.integers(0, len(data) + len(anchor) - 1))
    flipped = bytearray(data + anchor)
    flipped[place] ^= draw.draw(st.integers(1, 255))
    with written(bytes(flipped[: len(data)]), bytes(flipped[len(data) :])) as ledger:
        assert fault(ledger) in FAULTS


def test_every_byte_of_a_ledger_counts() -> None:
    lines, anchors = history()
    data = b"".join(lines)
    with written(data, anchors[-1]) as ledger:
        for place in range(len(data)):
            ledger.path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(LedgerError):
                ledger.entries()


def test_any_missing_tail_is_found() -> None:
    lines, anchors = history()
    data = b"".join(lines)
    for length in range(len(data)):
        with written(data[:length], anchors[-1]) as ledger, pytest.raises(LedgerError) as caught:
            ledger.entries()
        assert caught.value.fault == "short"


@given(st.permutations(range(3)), st.integers(0, 2), st.integers(0, 2))
def test_swapped_removed_and_duplicated_lines_are_found(order: list[int], drop: int, twice: int) -> None:
    lines, anchors = history()
    removed = [*lines[:drop], *lines[drop + 1 :]]
    doubled = [*lines[: twice + 1], *lines[twice:]]
    for changed in ([lines[place] for place in order], removed, doubled):
        if changed != list(lines):
            with written(b"".join(changed), anchors[-1]) as ledger:
                assert fault(ledger) in ("short", "long", "edited")


def test_the_place_of_an_edit_is_named(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 4)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    for place, said in ((0, "line 1 or 2"), (2, "line 3 or 4"), (3, "line 4")):
        changed = [*lines]
        changed[place] = lines[place].replace(b'"sigma":1.1', b'"sigma":9.1')
        ledger.path.write_bytes(b"".join(changed))
        with pytest.raises(LedgerError, match=said):
            ledger.entries()
    ledger.path.write_bytes(b"".join([lines[0], b"{}\n", *lines[2:]]))
    with pytest.raises(LedgerError, match="line 2"):
        ledger.entries()


def test_another_population_is_refused_and_no_word_helps(tmp_path: Path) -> None:
    ledger, other = filled(tmp_path / "one", 2), filled(tmp_path / "two", 0)
    stranger = at(tmp_path / "one", "12" * 16)
    assert fault(stranger) == "population"
    with pytest.raises(LedgerError, match="population"):
        stranger.adopt("it is the same")
    stranger.anchor.unlink()
    with pytest.raises(LedgerError, match="population"):
        stranger.adopt("it is the same")
    assert fault(at(tmp_path / "two", "12" * 16)) == "population"  # an empty one belongs to somebody too
    other.path.write_bytes(ledger.path.read_bytes())
    assert fault(other) == "long"


def test_missing_and_unreadable_files_have_their_own_words(tmp_path: Path) -> None:
    ledger = at(tmp_path)
    with pytest.raises(LedgerError, match="missing") as caught:
        ledger.entries()
    assert caught.value.fault in ("missing", "no-anchor")
    ledger = filled(tmp_path / "x", 1)
    anchor = ledger.anchor.read_bytes()
    ledger.anchor.unlink()
    assert fault(ledger) == "no-anchor"
    ledger.anchor.write_bytes(anchor)
    ledger.path.rename(tmp_path / "elsewhere")
    assert fault(ledger) == "missing"
    ledger.path.symlink_to(tmp_path / "elsewhere")
    assert fault(ledger) == "unreadable"
    ledger.path.unlink()
    ledger.path.mkdir()
    assert fault(ledger) == "unreadable"


def test_an_entry_of_a_newer_release_is_not_skipped(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 1)
    ledger.path.write_bytes(ledger.path.read_bytes().replace(b'"kind":"debit"', b'"kind":"later"'))
    assert fault(ledger) == "newer"
    with pytest.raises(LedgerError, match="release"):
        ledger.adopt("never mind")


# --- what the coordinator has seen


def test_an_older_copy_of_both_files_is_found_by_the_coordinators_echo(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 2)
    copy = ledger.path.read_bytes(), ledger.anchor.read_bytes()
    old, seen = ledger.head, ledger.debit(debit(), anything).head
    ledger.require(seen)
    ledger.require(old)
    ledger.require(START)
    ledger.path.write_bytes(copy[0])
    ledger.anchor.write_bytes(copy[1])
    assert ledger.head == old and not ledger.contains(seen.count, seen.digest)
    for _ in range(2):  # spending anew does not make up for it
        with pytest.raises(LedgerError, match="entry 3") as caught:
            ledger.require(seen)
        assert caught.value.fault == "head"
        ledger.debit(debit(), anything)
    assert not ledger.contains(3, "0" * 64) and not ledger.contains(99, seen.digest)


def test_a_word_settles_what_the_coordinator_saw(tmp_path: Path) -> None:
    ledger, seen = filled(tmp_path, 2), Head(count=7, digest="7" * 64)
    with pytest.raises(StateError, match="nothing is wrong"):
        ledger.adopt("for fun")
    with pytest.raises(LedgerError):
        ledger.require(seen)
    entry = ledger.adopt("restored after the fire, N. N.")
    assert entry.number == 3
    assert entry.payload == Adopt(
        reason="restored after the fire, N. N.", fault="head", anchor=ledger.entries()[1].head, coordinator=seen
    )
    ledger.require(seen)
    with pytest.raises(StateError, match="nothing is wrong"):
        ledger.adopt("again")
    with pytest.raises(LedgerError):
        ledger.require(Head(count=7, digest="8" * 64))


@pytest.mark.parametrize("reason", ["", "two\nlines", "\x1b[31m", "x" * 501])
def test_a_reason_is_one_line_of_text(tmp_path: Path, reason: str) -> None:
    ledger = filled(tmp_path, 1)
    ledger.anchor.unlink()
    with pytest.raises(ConfigError):
        ledger.adopt(reason)
    assert fault(ledger) == "no-anchor"


# --- a person's word about the files


def test_a_word_keeps_every_debit_that_can_be_read(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 5)
    lost, known = debits(ledger.entries())[1], ledger.head
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([lines[0], b"?" + lines[1][1:], *lines[2:]])
    ledger.path.write_bytes(damaged)
    assert fault(ledger) == "edited"
    ledger.adopt("a bad sector")
    kept = ledger.entries()
    assert len(debits(kept)) == 4 and lost not in debits(kept) and isinstance(kept[-1].payload, Adopt)
    assert kept[-1].payload.anchor == known and ledger.contains(known.count, known.digest)
    (aside,) = tmp_path.glob("ledger.damaged-*.jsonl")
    assert aside.read_bytes() == damaged and stat.S_IMODE(aside.stat().st_mode) == 0o600
    ledger.debit(debit(), anything)


@pytest.mark.parametrize("gone", ["ledger", "anchor", "both", "tail", "anchor's newest"])
def test_a_word_settles_what_is_gone(tmp_path: Path, gone: str) -> None:
    ledger = filled(tmp_path, 2)
    old = ledger.path.read_bytes(), ledger.anchor.read_bytes()
    known = ledger.debit(debit(), anything).head
    if gone in ("ledger", "both"):
        ledger.path.unlink()
    if gone in ("anchor", "both"):
        ledger.anchor.unlink()
    if gone == "tail":
        ledger.path.write_bytes(old[0])
    if gone == "anchor's newest":
        ledger.anchor.write_bytes(old[1])
    fault(ledger)
    entry = ledger.adopt("N. N. knows why")
    kept = {"ledger": 0, "both": 0, "tail": 2}.get(gone, 3)
    assert len(debits(ledger.entries())) == kept and entry.number == kept + 1
    assert ledger.contains(known.count, known.digest) == (gone != "both")
    assert not list(tmp_path.glob("ledger.damaged-*"))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_word_settles_any_flipped_byte_that_a_word_may_settle(draw: st.DataObject) -> None:
    lines, anchors = history()
    data = b"".join(lines)
    place = draw.draw(st.integers(0, len(data) - 1))
    flipped = data[:place] + bytes([data[place] ^ draw.draw(st.integers(1, 255))]) + data[place + 1 :]
    with written(flipped, anchors[-1]) as ledger:
        try:
            ledger.adopt("a bad sector")
        except LedgerError as error:
            assert error.fault in HELPLESS
            return
        assert len(debits(ledger.entries())) >= 1  # a newline that is gone takes the two lines beside it along
        ledger.debit(debit(), anything)


def test_a_whole_chain_is_left_as_it_is() -> None:
    data = b"".join(history()[0])
    assert rechain(data, POPULATION, Path("ledger.jsonl")) == data
