"""Images whose file is gone: counted, told, and removed only on request, never because a disk is not mounted."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rin.client.home import Home
from rin.client.ingest.cache import IMAGE_BYTES
from rin.client.ingest.gone import GoneCount
from rin.client.ingest.pipeline import IngestReport, ingest
from rin.client.status import status
from rin.common.errors import StateError
from tests.client.ingest.radimagenet_tree import rows, run, write_tree

DicomFile = Callable[..., Path]
UID = "1.2.826.0.1.3680043.8.498.3"


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2000, (32, 32)).astype(np.int16)


def dicom(home: Home, *roots: Path, **options: Any) -> IngestReport:
    report = ingest(home, site="siteA", roots=roots, workers=1, **options)
    assert report.files == report.accepted_files + sum(report.refused.values())
    return report


@pytest.fixture
def archive(dicom_file: DicomFile, tmp_path: Path) -> Path:
    """Three patients with two files each: old/ holds the first patient's, new/ the others'."""
    for number in range(6):
        folder = "old" if number < 2 else "new"
        dicom_file(picture(number), name=f"{folder}/{number}.dcm", PatientID=f"P{number // 2}")
    return tmp_path / "archive"


def slots(home: Home) -> list[bool]:
    """Whether there are pixels, slot by slot."""
    data = home.cache.joinpath("shard-00000.u8").read_bytes()
    return [any(data[at : at + IMAGE_BYTES]) for at in range(0, len(data), IMAGE_BYTES)]


def test_what_is_gone_stays_and_is_counted_until_it_is_pruned(archive: Path, home: Home) -> None:
    assert dicom(home, archive).gone == GoneCount()
    assert status(home)["catalog"]["images_gone"] == 0
    shutil.rmtree(archive / "old")
    report = dicom(home, archive)
    assert (report.files, report.gone, report.pruned) == (4, GoneCount(2, 1, 0), 0)
    assert json.loads(json.dumps(report.as_json()))["gone"] == {"images": 2, "patients": 1, "earlier_labels": 0}
    facts = status(home)["catalog"]
    assert (facts["images"], facts["images_gone"], facts["patients_gone"]) == (6, 2, 1)
    assert "--prune" in facts["next"]
    report = dicom(home, archive, prune=True)
    assert (report.gone, report.pruned, report.accepted) == (GoneCount(), 2, 4)
    assert rows(home, "SELECT count(*), count(DISTINCT patient) FROM images") == [(4, 2)]
    assert rows(home, "SELECT count(*) FROM files") == [(4,)]
    assert sorted(slots(home)) == [False] * 2 + [True] * 4
    assert "next" not in status(home)["catalog"]


def test_labels_that_were_withdrawn_for_files_that_are_gone_are_told(archive: Path, home: Home, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    lines = [f"{UID}.{number},MR_brain_edema" for number in range(1, 7)]
    labels.write_text("\n".join(["sop_instance_uid,label", *lines]))
    dicom(home, archive, labels=labels)
    shutil.rmtree(archive / "old")
    assert dicom(home, archive, labels=labels).gone == GoneCount(2, 1, 0)
    labels.write_text("\n".join(["sop_instance_uid,label", *lines[1:]]))
    report = dicom(home, archive, labels=labels)
    assert report.gone == GoneCount(2, 1, 2)
    assert "2 with labels" in report.gone.as_text()


def test_a_disk_that_is_not_mounted_empties_nothing(archive: Path, home: Home, tmp_path: Path) -> None:
    dicom(home, archive)
    (archive / "new").rename(tmp_path / "away")
    (archive / "old").rename(tmp_path / "away2")
    told: list[str] = []
    report = dicom(home, archive, warn=told.append)
    assert (report.empty_roots, report.gone.images) == (1, 6)
    assert "holds no file" in told[0]
    with pytest.raises(StateError, match="1 of 1 archive folders hold no file"):
        dicom(home, archive, prune=True)
    assert status(home)["catalog"]["images"] == 6
    assert all(slots(home))


def test_roots_are_all_named_and_none_is_empty(archive: Path, home: Home, tmp_path: Path) -> None:
    dicom(home, archive / "old", archive / "new")
    with pytest.raises(StateError, match="other archive folders"):
        dicom(home, archive / "new", prune=True)
    shutil.rmtree(archive / "old")
    (archive / "old").mkdir()
    with pytest.raises(StateError, match="1 of 2 archive folders"):
        dicom(home, archive / "old", archive / "new", prune=True)
    assert dicom(home, archive / "new").gone == GoneCount(2, 1, 0)  # said first,
    assert dicom(home, archive / "new", prune=True).pruned == 2  # then removed


@pytest.mark.skipif(os.geteuid() == 0, reason="root lists every folder")
def test_a_folder_that_cannot_be_listed_is_not_gone(archive: Path, home: Home) -> None:
    dicom(home, archive)
    (archive / "old").chmod(0)
    try:
        with pytest.raises(StateError, match="cannot be listed"):
            dicom(home, archive, prune=True)
    finally:
        (archive / "old").chmod(0o700)
    assert dicom(home, archive).gone.images == 0


def test_a_second_file_of_the_same_image_takes_over(archive: Path, home: Home, dicom_file: DicomFile) -> None:
    twin = archive / "twin.dcm"
    shutil.copyfile(archive / "old" / "0.dcm", twin)
    dicom_file(picture(1), name="same-pixels.dcm", PatientID="P9")
    first = dicom(home, archive)
    assert first.refused == {"duplicate-instance": 1, "duplicate-pixels": 1}
    shutil.rmtree(archive / "old")
    report = dicom(home, archive)
    assert (report.gone.images, report.accepted, report.refused) == (1, 5, {"duplicate-pixels": 1})
    report = dicom(home, archive, prune=True)
    assert (report.gone.images, report.pruned, report.accepted, report.refused) == (0, 1, 6, {})


def test_the_other_layout_prunes_too_and_counts_no_patients(home: Home, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "data", images=2, side=48)
    twin = tree.root / "CT/abd/ascites/twin.png"
    twin.parent.mkdir()
    shutil.copyfile(tree.root / "CT/abd/normal/abd000000.png", twin)
    run(home, tree.root)
    for name in ("CT/abd/normal", "MR/knee"):
        shutil.rmtree(tree.root / name)
    report = run(home, tree.root)
    assert report.gone == GoneCount(3, None, 0)  # the fourth is the twin's now
    assert status(home)["catalog"]["patients_gone"] == "unknown"
    report = run(home, tree.root, prune=True)
    assert (report.gone, report.pruned, report.decoded) == (GoneCount(0, None, 0), 3, 0)
    assert slots(home).count(False) == 3


def test_a_killed_run_calls_nothing_gone(archive: Path, home: Home) -> None:
    dicom(home, archive)
    with sqlite3.connect(home.catalog) as db:  # run 2 was killed after it had seen one file
        db.execute("UPDATE meta SET value = '2' WHERE key = 'run'")
        db.execute("UPDATE files SET seen = 2 WHERE path_key = (SELECT min(path_key) FROM files)")
    db.close()
    assert status(home)["catalog"]["images_gone"] == 0
    assert dicom(home, archive, prune=True).pruned == 0


def test_the_command_says_it_and_does_it(archive: Path, home: Home) -> None:
    command = [sys.executable, "-m", "rin.client.cli", "ingest", "--home", str(home.root)]
    command += ["--site", "siteA", "--root", str(archive)]
    subprocess.run(command, capture_output=True, check=True)
    shutil.rmtree(archive / "old")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "WARNING: 2 images of 1 patients have no file any more" in done.stderr
    done = subprocess.run([*command, "--prune"], capture_output=True, text=True, check=True)
    assert "2  images whose files are gone" in done.stdout
    shutil.rmtree(archive / "new")
    done = subprocess.run([*command, "--prune"], capture_output=True, text=True, check=False)
    assert (done.returncode, "nothing was removed" in done.stderr) == (1, True)
