"""The walk is ordered, counts every file once, and is not caught by pipes and circles."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rin.client.ingest.walk import check_roots, walk
from rin.common.errors import ConfigError


def test_order_links_and_what_is_left_out(tmp_path: Path) -> None:
    root, home = tmp_path / "archive", tmp_path / "archive" / "home"
    for name in ("b/2", "b/10", "a", "home/vault/shard"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    os.mkfifo(root / "pipe")
    (root / "circle").symlink_to(root, target_is_directory=True)
    (root / "link").symlink_to(root / "a")
    (root / "zz-broken").symlink_to(root / "nowhere")
    found = list(walk(root, leave_out=home))
    assert [(item.relative, item.size) for item in found] == [
        ("a", 1),
        ("b/10", 1),
        ("b/2", 1),
        ("link", 1),
        ("zz-broken", -1),
    ]


def test_roots(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "ab").mkdir()
    roots = [tmp_path / "ab", tmp_path / "a" / "b", tmp_path / "a"]
    assert check_roots(roots) == [tmp_path / "a", tmp_path / "ab"]
    with pytest.raises(ConfigError) as error:
        check_roots([tmp_path / "x", tmp_path / "y"])
    assert len(error.value.message.splitlines()) == 2
    with pytest.raises(ConfigError, match="no archive root"):
        check_roots([])
