"""The site's key and what is made with it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from rin.client.ingest.pseudonyms import Pseudonyms, site_pseudonyms, split_of
from rin.client.ingest.selection import Identity
from rin.common.errors import StateError

WHO = Identity(b"P1", b"", b"1.1", b"1.2", b"1.3")


def test_the_key_is_made_once_and_is_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "vault" / "keys" / "pseudonym.key"
    with pytest.raises(StateError):
        site_pseudonyms(path, create=False)
    names = site_pseudonyms(path, create=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert site_pseudonyms(path, create=True) == names
    assert len(names.key) == 32
    assert [child.name for child in path.parent.iterdir()] == ["pseudonym.key"]
    path.write_bytes(b"short")
    with pytest.raises(StateError, match="not a pseudonym key"):
        site_pseudonyms(path, create=False)


def test_pseudonyms_depend_on_key_kind_and_issuer() -> None:
    names, other = Pseudonyms(bytes(32)), Pseudonyms(b"1" * 32)
    assert len(names.patient(WHO)) == 16
    assert names.patient(WHO) != other.patient(WHO)
    assert names.of("study", b"1.3") != names.instance(WHO)
    moved = Identity(b"P1", b"H2", b"1.1", b"1.2", b"1.3")
    assert names.patient(moved) != names.patient(WHO)
    joined = Identity(b"1\0P", b"", b"", b"", b"")
    assert names.patient(joined) != names.patient(Identity(b"P", b"1", b"", b"", b""))


def test_the_split_is_75_10_15_of_the_patients() -> None:
    names = Pseudonyms(bytes(range(32)))
    splits = [split_of(names.of("patient", str(number).encode())) for number in range(20000)]
    assert splits.count("train") / 20000 == pytest.approx(0.75, abs=0.01)
    assert splits.count("val") / 20000 == pytest.approx(0.10, abs=0.01)
    assert splits.count("test") / 20000 == pytest.approx(0.15, abs=0.01)
