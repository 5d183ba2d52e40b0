"""Ingest as a whole: everything is accounted for, nothing is lost, nothing identifying is kept."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest

from rin.client.data import TrainingData
from rin.client.home import Home
from rin.client.ingest.cache import MEND, map_shards
from rin.client.ingest.catalog import read_images
from rin.client.ingest.pipeline import IngestReport, Progress, explain, ingest
from rin.common.errors import ConfigError, StateError
from rin.common.labels import label_index

DicomFile = Callable[..., Path]
EDEMA, NORMAL = label_index()["MR_brain_edema"], label_index()["MR_brain_normal"]
UID = "1.2.826.0.1.3680043.8.498.3"


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2000, (32, 32)).astype(np.int16)


def run(home: Home, root: Path, **options: Any) -> IngestReport:
    report = ingest(home, site="siteA", roots=[root], workers=1, **options)
    assert report.files == report.accepted_files + sum(report.refused.values())
    return report


def rows(home: Home, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(home.catalog) as db:
        found = db.execute(query).fetchall()
    db.close()
    return found


def csv(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def archive(dicom_file: DicomFile, tmp_path: Path) -> Path:
    """Files 1 to 4 of two patients are good; the others are not."""
    for number in range(1, 5):
        dicom_file(picture(number), name=f"good/CANARY^NAME-{number}.dcm", PatientID=f"CANARY-{number % 2}")
    dicom_file(picture(1), name="same-pixels.dcm")
    dicom_file(picture(9), name="same-instance.dcm", SOPInstanceUID=f"{UID}.1")
    dicom_file(np.full((8, 8), 3, np.int16), name="flat.dcm")
    dicom_file(picture(10), name="localizer.dcm", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    dicom_file(picture(11), name="nobody.dcm", PatientID=None)
    cut = dicom_file(picture(12), name="cut.dcm")
    cut.write_bytes(cut.read_bytes()[:-99])
    (tmp_path / "archive" / "empty").touch()
    (tmp_path / "archive" / "LICENSE").write_text("not an image")
    return tmp_path / "archive"


EXPECTED = {
    "constant": 1,
    "duplicate-instance": 1,
    "duplicate-pixels": 1,
    "empty": 1,
    "localizer": 1,
    "no-patient-id": 1,
    "not-dicom": 1,
    "truncated": 1,
}


def test_every_file_has_an_image_or_a_reason(archive: Path, home: Home) -> None:
    told: list[Progress] = []
    report = run(home, archive, progress=told.append)
    assert report.refused == EXPECTED
    assert (report.files, report.accepted, report.decoded, report.refused_images) == (12, 4, 4, {})
    assert told[-1] == Progress("read", 12, 12, 4, 8)
    shown = {(path.name, reason) for path, reason in explain(home, [archive])}
    assert len(shown) == 8
    assert {("empty", "empty"), ("cut.dcm", "truncated"), ("same-pixels.dcm", "duplicate-pixels")} <= shown


def test_a_second_run_reads_nothing_and_says_the_same(archive: Path, home: Home) -> None:
    first = run(home, archive)
    before = home.cache.joinpath("shard-00000.u8").read_bytes()
    second = run(home, archive)
    assert second.decoded == 0
    keys = first.as_json().keys() - {"seconds", "decoded"}
    assert {key: first.as_json()[key] for key in keys} == {key: second.as_json()[key] for key in keys}
    assert home.cache.joinpath("shard-00000.u8").read_bytes() == before


def test_nothing_identifying_is_kept(archive: Path, home: Home) -> None:
    labels = csv(archive.parent / "labels.csv", "path,label", "good/CANARY^NAME-1.dcm,MR_brain_edema")
    run(home, archive)
    run(home, archive, labels=labels)
    for path in home.root.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for word in (b"CANARY", b"archive", b"20200229", UID.encode(), b"1.2.826"):
                assert word not in data, (path.name, word)


def test_changed_files_are_read_again_and_the_old_pixels_are_gone(
    archive: Path, home: Home, dicom_file: DicomFile
) -> None:
    run(home, archive)
    old = home.cache.joinpath("shard-00000.u8").read_bytes()[: 1 << 16]
    dicom_file(picture(77), name="good/CANARY^NAME-1.dcm", SOPInstanceUID=f"{UID}.1", PatientID="CANARY-1")
    report = run(home, archive)
    # With the image gone whose pixels it repeated, `same-pixels` is still refused: it has not changed itself.
    assert (report.accepted, report.decoded, report.refused) == (4, 1, EXPECTED)
    data = home.cache.joinpath("shard-00000.u8").read_bytes()
    assert old not in data
    assert data[: 1 << 16] == bytes(1 << 16)
    assert len(data) == 5 << 16


def test_a_moved_file_keeps_its_image(archive: Path, home: Home) -> None:
    run(home, archive)
    (archive / "good").rename(archive / "moved")
    report = run(home, archive)
    assert (report.accepted, report.decoded, report.refused) == (4, 0, EXPECTED)
    assert len(rows(home, "SELECT * FROM files")) == 12


def test_labels_decide_what_comes_in_and_may_change(archive: Path, home: Home, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    first = csv(labels, "sop_instance_uid,label", *[f"{UID}.{n},{name}" for n, name in ((1, "oe"), (2, "n"), (3, "?"))])
    mapping = csv(
        tmp_path / "mapping.csv",
        "modality,body_part,local_label,coding_scheme,rin_class",
        "*,*,oe,*,MR_brain_edema",
        "*,*,n,*,MR_brain_normal",
    )
    report = run(home, archive, labels=first, mapping=mapping)
    assert report.labels == {"MR_brain_edema": 1, "MR_brain_normal": 1}
    assert report.unmapped == {"?": 1}
    assert report.refused["unmapped-label"] == 1
    assert report.refused["unlabelled"] == 4  # good 4, flat, same-pixels, cut; same-instance is 1 again
    assert run(home, archive, labels=first, mapping=mapping).unmapped == {"?": 1}

    second = csv(labels, "sop_instance_uid,label", f"{UID}.1,n", f"{UID}.1,oe", f"{UID}.4,oe")
    report = run(home, archive, labels=second, mapping=mapping)
    assert report.labels == {"MR_brain_edema": 2, "MR_brain_normal": 1}
    assert (report.accepted, report.decoded) == (2, 1)
    data = TrainingData.open(home, labels=range(165), split="train")
    assert data.n_images + _others(home) == 2


def _others(home: Home) -> int:
    return sum(TrainingData.open(home, labels=range(165), split=split).n_images for split in ("val", "test"))


def test_labels_of_single_frames(dicom_file: DicomFile, home: Home, tmp_path: Path) -> None:
    frames = np.stack([picture(1), picture(2), picture(3), np.zeros((32, 32), np.int16)])
    dicom_file(frames, NumberOfFrames=4)
    labels = tmp_path / "labels.csv"
    by_frame = csv(
        labels,
        "sop_instance_uid,frame,label",
        f"{UID}.1,2,MR_brain_edema",
        f"{UID}.1,2,MR_brain_normal",
        f"{UID}.1,3,unknown",
        f"{UID}.1,4,MR_brain_edema",
    )
    report = run(home, tmp_path / "archive", labels=by_frame)
    assert (report.files, report.accepted, report.refused) == (1, 1, {})
    assert report.refused_images == {"constant": 1, "unlabelled": 1, "unmapped-label": 1}
    assert rows(home, "SELECT frame FROM images") == [(2,)]
    assert rows(home, "SELECT label FROM image_labels ORDER BY 1") == sorted([(EDEMA,), (NORMAL,)])
    every = csv(labels, "series_uid,instance_number,label", "1.2.826.0.1.3680043.8.498.2.1,1,MR_brain_edema")
    report = run(home, tmp_path / "archive", labels=every)
    assert (report.accepted, report.refused_images) == (3, {"constant": 1})


def test_unusual_headers_go_through_the_worker(dicom_file: DicomFile, home: Home, tmp_path: Path) -> None:
    dicom_file(picture(1), syntax="1.2.840.10008.1.2.1.99")
    dicom_file(picture(2))
    assert run(home, tmp_path / "archive").accepted == 2


def test_a_codec_that_is_lied_to_costs_one_file(dicom_file: DicomFile, home: Home, tmp_path: Path) -> None:
    syntax = "1.2.840.10008.1.2.4.80"
    pixels = picture(1).view(np.uint16)
    stream = imagecodecs.jpegls_encode(pixels)
    dicom_file(pixels, syntax=syntax, frames=[stream])
    dicom_file(pixels, syntax=syntax, frames=[stream], Rows=31)
    dicom_file(pixels, syntax=syntax, frames=[stream[:100] + bytes(40) + stream[140:]])
    dicom_file(pixels, syntax="1.2.840.10008.1.2.4.102", frames=[stream])
    report = run(home, tmp_path / "archive")
    assert report.accepted == 1
    assert report.refused.pop("codec-mismatch") == 1
    assert report.refused.pop("unsupported-syntax") == 1
    assert sum(report.refused.values()) == 1  # damaged entropy code: an error, or other pixels of the same size


def test_a_site_of_one_patient_can_train(dicom_file: DicomFile, tmp_path: Path) -> None:
    for number in range(3):
        dicom_file(picture(number))
    for attempt in range(3):  # another key each time: a quarter of them would put the patient elsewhere
        run(home := Home(tmp_path / f"home{attempt}"), tmp_path / "archive")
        assert rows(home, "SELECT DISTINCT split FROM images") == [("train",)]
    dicom_file(picture(9))
    run(home := Home(tmp_path / "home0"), tmp_path / "archive")
    assert rows(home, "SELECT DISTINCT split FROM images") == [("train",)]


def test_a_home_belongs_to_one_site_and_key(archive: Path, home: Home) -> None:
    run(home, archive)
    with pytest.raises(StateError, match="another site"):
        ingest(home, site="siteB", roots=[archive])
    key = home.pseudonym_key.read_bytes()
    home.pseudonym_key.write_bytes(bytes(32))
    with pytest.raises(StateError, match="another key"):
        run(home, archive)
    home.pseudonym_key.unlink()
    with pytest.raises(StateError, match="missing"):
        run(home, archive)
    home.pseudonym_key.write_bytes(key)
    assert run(home, archive).decoded == 0


def test_wrong_arguments_touch_nothing(archive: Path, home: Home) -> None:
    for site, root in (("no_site", archive), ("siteA", archive / "nowhere")):
        with pytest.raises(ConfigError):
            ingest(home, site=site, roots=[root])
    with pytest.raises(ConfigError):
        ingest(home, site="siteA", roots=[archive], labels=archive / "LICENSE")
    assert not home.root.exists()


def test_a_file_that_cannot_be_read_for_now_keeps_its_image(archive: Path, home: Home) -> None:
    run(home, archive)
    path = archive / "good" / "CANARY^NAME-1.dcm"
    data = path.read_bytes()
    path.unlink()
    path.symlink_to(archive / "not-mounted")
    assert run(home, archive).accepted == 4
    path.unlink()
    path.write_bytes(data)
    assert run(home, archive).accepted == 4


_INGEST = (
    "import sys; from pathlib import Path; from rin.client.home import Home;"
    "from rin.client.ingest import pipeline, run; run.COMMIT_IMAGES = 7;"
    "pipeline.ingest(Home(Path(sys.argv[1])), site='siteA', roots=[Path(sys.argv[2])], workers=1)"
)


def _catalogued(home: Home) -> list[tuple[Any, ...]]:
    columns = "patient, study, series, instance, frame, split, digest, policy"
    return rows(home, f"SELECT {columns} FROM images ORDER BY patient, instance, frame")


def test_killed_at_any_moment_it_goes_on(dicom_file: DicomFile, home: Home, tmp_path: Path) -> None:
    """The home ends as that of an undisturbed run with the same key: same rows, same pixels in canonical order."""
    for number in range(120):
        dicom_file(picture(number), PatientID=f"P{number // 4}")
    calm = Home(tmp_path / "calm")
    run(calm, tmp_path / "archive")
    home.pseudonym_key.parent.mkdir(parents=True)
    home.pseudonym_key.write_bytes(calm.pseudonym_key.read_bytes())
    dice = random.Random(5)
    kills = sum(_killed(home, tmp_path / "archive", dice.uniform(0, 0.02)) for _ in range(3))
    assert kills >= 1
    shard = home.cache / "shard-00000.u8"
    with shard.open("ab") as file:
        file.write(b"the half of an image that a kill between write and commit leaves")
    report = run(home, tmp_path / "archive")
    assert report.accepted == 120
    assert report.decoded < 120
    assert shard.stat().st_size == 120 << 16
    assert _catalogued(home) == _catalogued(calm)
    _same_pixels(home, calm)


def _killed(home: Home, archive: Path, delay: float) -> bool:
    """Start an ingest and kill it `delay` seconds after it wrote something new; False if it was quicker."""
    shard = home.cache / "shard-00000.u8"
    size = shard.stat().st_size if shard.exists() else 0
    child = subprocess.Popen([sys.executable, "-c", _INGEST, str(home.root), str(archive)])
    while child.poll() is None and (not shard.exists() or shard.stat().st_size <= size):
        time.sleep(0.002)
    time.sleep(delay)
    child.kill()
    return child.wait() != 0


def _same_pixels(home: Home, other: Home) -> None:
    """Unlabelled images are no training data, so their slots are read through the catalog."""
    stacks = []
    for each in (home, other):
        slots, images = read_images(each.catalog)
        shard = map_shards(each.cache, slots=slots)[0]
        stacks.append(np.stack([shard[image.slot] for image in images]))
    np.testing.assert_array_equal(*stacks)


@pytest.mark.parametrize("size", [100, 5000, 40_000])
def test_damage_is_one_line_with_what_helps_and_that_helps(archive: Path, home: Home, size: int) -> None:
    run(home, archive)
    split = rows(home, "SELECT patient, split FROM images ORDER BY 1, 2")
    data = home.catalog.read_bytes()
    home.catalog.write_bytes(data[:size] + b"\xff" * (len(data) - size))
    with pytest.raises(StateError) as ingested:
        run(home, archive)
        TrainingData.open(home, labels=range(165), split="train")
    assert ingested.value.step == MEND
    for path in home.catalog.parent.glob("catalog.sqlite*"):
        path.unlink()
    shutil.rmtree(home.cache)
    assert run(home, archive).decoded == 4
    assert rows(home, "SELECT patient, split FROM images ORDER BY 1, 2") == split


def test_training_and_ingest_say_the_same_of_a_short_shard(archive: Path, home: Home) -> None:
    run(home, archive)
    os.truncate(home.cache / "shard-00000.u8", 1 << 16)
    faults = []
    for work in (lambda: run(home, archive), lambda: TrainingData.open(home, labels=range(165), split="train")):
        with pytest.raises(StateError, match="holds less") as fault:
            work()
        faults.append(str(fault.value))
    assert faults[0] == faults[1]
