"""The search for canaries finds what is planted and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rin.common.errors import StateError
from rin.server import canaries


@pytest.fixture
def planted(tmp_path: Path) -> canaries.Canaries:
    record = {"marker": "CANARY", "uid_root": "1.2.826.77", "canaries": ["CANARY^ZOE"], "dates": ["19560214"]}
    (tmp_path / "siteA.canaries.json").write_text(json.dumps(record))
    return canaries.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "hits"),
    [
        ("tap.bin", b"\x00\x01CANARY^ZOE\xff", 1),
        ("tap.bin", "CANARY".encode("utf-16-le"), 1),
        ("tap.bin", b"canary^zoe", 1),
        ("tap.bin", b"..1.2.826.77.5..", 1),
        ("tap.bin", b"19560214", 0),  # eight digits occur in weights by chance
        ("agent.log", b'{"born": "19560214"}', 1),
        ("agent.log", b"digest 7719560214ab", 0),
        ("CANARY.log", b"", 1),
        ("agent.log", b"nothing", 0),
    ],
)
def test_search(tmp_path: Path, planted: canaries.Canaries, name: str, data: bytes, hits: int) -> None:
    place = tmp_path / "left"
    place.mkdir()
    (place / name).write_bytes(data)
    found = canaries.search([place], planted)
    assert len(found.hits) == hits
    assert found.searched == len(data)


def test_a_canary_across_two_blocks_is_found(
    tmp_path: Path, planted: canaries.Canaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canaries, "BLOCK", 8)
    (tmp_path / "tap.bin").write_bytes(b"12345CANARY^ZOE")
    assert canaries.search([tmp_path / "tap.bin"], planted).hits


def test_no_record_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no record"):
        canaries.read(tmp_path)
