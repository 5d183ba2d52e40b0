"""The catalog's own rules: durable commits, unique images, schema, removal."""

from __future__ import annotations

import dataclasses
import sqlite3
import stat
from pathlib import Path

import pytest

from rin.client.ingest.cache import MEND
from rin.client.ingest.catalog import Catalog, ImageRow, patients_known, read_images, undamaged
from rin.common.errors import StateError

ROW = ImageRow(
    b"p" * 16, b"s" * 16, b"t" * 16, b"i" * 16, 1, "MR", "brain", "train", b"d" * 16,
    "window", 8, 8, 12, "MONOCHROME2", "1.2.840.10008.1.2.1", False, (3, 12),
)  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vault" / "catalog.sqlite"


def put(catalog: Catalog, key: bytes, reason: str | None) -> None:
    catalog.put_file(key, stamp=b"1", labelling=b"2", reason=reason, open_=False, run=1)


def test_only_commits_survive(path: Path) -> None:
    catalog = Catalog(path)
    catalog.add_image(b"f", ROW, slot=0)
    put(catalog, b"f", None)
    catalog.commit()
    catalog.refuse(b"g", "empty", 1)
    put(catalog, b"g", "empty")
    catalog.close()
    again = Catalog(path)
    assert again.totals(1) == (1, 1, 1)
    assert again.reasons(b"g") == []
    again.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_instances_frames_and_pixels_are_unique(path: Path) -> None:
    catalog = Catalog(path)
    catalog.add_image(b"f", ROW, slot=0)
    for other, slot in ((dataclasses.replace(ROW, digest=b"e" * 16), 1), (dataclasses.replace(ROW, frame=2), 1)):
        with pytest.raises(sqlite3.IntegrityError):
            catalog.add_image(b"f", other, slot=slot)
    catalog.close()


def test_a_forgotten_file_leaves_its_slots_to_be_erased(path: Path) -> None:
    catalog = Catalog(path)
    catalog.add_image(b"f", ROW, slot=4)
    catalog.refuse(b"f", "constant", 2)
    catalog.refuse(b"f", "constant", 1)
    put(catalog, b"f", None)
    assert catalog.refused_images(1) == {"constant": 3}
    catalog.forget_file(b"f")
    assert catalog.known(b"f") is None
    assert catalog.frames_of(b"i" * 16) == {}
    assert catalog.label_counts(1) == {}
    assert catalog.erased() == [4]
    catalog.clear_erased([4])
    catalog.commit()
    catalog.close()
    assert list(read_images(path)[1]) == []


def test_readers_see_labels_and_splits(path: Path) -> None:
    catalog = Catalog(path)
    catalog.add_image(b"f", ROW, slot=20000)
    catalog.set_meta("slots", "20001")
    catalog.commit()
    slots, images = read_images(path, split="train")
    (image,) = images
    assert (slots, image.labels, image.place) == (20001, (3, 12), (1, 3616))
    assert list(read_images(path, split="val")[1]) == []
    catalog.close()


def test_another_schema_is_refused(path: Path) -> None:
    catalog = Catalog(path)
    catalog.set_meta("schema", "99")
    catalog.commit()
    catalog.close()
    with pytest.raises(StateError, match="schema 99"):
        Catalog(path)
    with pytest.raises(StateError, match="missing"):
        read_images(path.with_name("none.sqlite"))


@pytest.mark.parametrize("damage", ["no database", "pages", "tables"])
def test_a_damaged_catalog_is_an_error_with_what_helps(path: Path, damage: str) -> None:
    catalog = Catalog(path)
    for number in range(400):
        own = number.to_bytes(2, "big")
        catalog.add_image(own, dataclasses.replace(ROW, instance=own, digest=own), slot=number)
    catalog.commit()
    catalog.close()
    data = path.read_bytes()
    if damage == "no database":
        path.write_bytes(b"something else" * 1000)
    elif damage == "pages":
        path.write_bytes(data[:4096] + bytes(byte ^ 255 for byte in data[4096:]))
    else:
        path.write_bytes(b"")
    readers = [lambda: read_images(path), lambda: patients_known(path)]
    if damage == "no database":
        readers.append(lambda: Catalog(path))
    if damage == "pages":  # the meta table may lie on a sound page
        readers = readers[:1]
    for read in readers:
        with pytest.raises(StateError, match=r"catalog\.sqlite is damaged") as error:
            read()
        assert error.value.step == MEND


def test_a_lock_is_no_damage(path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError, match="locked"), undamaged(path):
        raise sqlite3.OperationalError("database is locked")
