"""Shards: a kill leaves a valid prefix, removed images are zeros, a full disk is said."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from rin.client.ingest import cache as module
from rin.client.ingest.cache import IMAGE_BYTES, Cache, map_shards, shard_path
from rin.common.errors import RinError, StateError


def picture(value: int) -> bytes:
    return bytes([value]) * IMAGE_BYTES


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_IMAGES", 4)


@pytest.mark.usefixtures("small_shards")
def test_images_run_over_shards(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", slots=0)
    assert cache.append([picture(n) for n in range(6)]) == 0
    assert cache.append([picture(n) for n in range(6, 11)]) == 6
    shards = map_shards(tmp_path / "cache", slots=11)
    assert [len(shard) for shard in shards] == [4, 4, 3]
    assert [int(shard[at, 0, 0]) for shard in shards for at in range(len(shard))] == list(range(11))
    assert shards[0][1].shape == (256, 256)
    assert not shards[0].flags.writeable
    assert (tmp_path / "cache" / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert stat.S_IMODE(shard_path(tmp_path / "cache", 0).stat().st_mode) == 0o600


@pytest.mark.usefixtures("small_shards")
def test_opening_cuts_off_what_was_not_committed(tmp_path: Path) -> None:
    Cache(tmp_path, slots=0).append([picture(n) for n in range(10)])
    with shard_path(tmp_path, 1).open("ab") as file:
        file.write(b"half an image")
    cache = Cache(tmp_path, slots=6)
    assert not shard_path(tmp_path, 2).exists()
    assert shard_path(tmp_path, 1).stat().st_size == 2 * IMAGE_BYTES
    cache.append([picture(77)])
    assert np.unique(map_shards(tmp_path, slots=7)[1][2]).tolist() == [77]


def test_a_short_write_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: whole(fd, [memoryview(parts[0])[:40_000]], at))
    images = [bytes([n, 255 - n]) * (IMAGE_BYTES // 2) for n in range(3)]
    Cache(tmp_path, slots=0).append(images)
    assert shard_path(tmp_path, 0).read_bytes() == b"".join(images)


def test_less_than_the_catalog_says_is_an_error(tmp_path: Path) -> None:
    Cache(tmp_path, slots=0).append([picture(1)])
    with pytest.raises(StateError, match="holds less"):
        Cache(tmp_path, slots=2)
    with pytest.raises(StateError, match="holds less"):
        map_shards(tmp_path, slots=2)


def test_erased_slots_are_zeros(tmp_path: Path) -> None:
    cache = Cache(tmp_path, slots=0)
    cache.append([picture(1), picture(2), picture(3)])
    cache.erase([1])
    assert [int(image.max()) for image in map_shards(tmp_path, slots=3)[0]] == [1, 0, 3]


def test_a_full_disk_is_said_before_it_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, slots=0)
    monkeypatch.setattr(module, "RESERVE", 1 << 60)
    with pytest.raises(RinError) as error:
        cache.append([picture(1)])
    assert error.value.code == "disk-full"
    assert "again" in error.value.step
