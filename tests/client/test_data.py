"""Batches come from the cache in canonical order, with the declared labels only."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rin.client.data import TrainingData
from rin.client.home import Home
from rin.client.ingest.cache import IMAGE_BYTES, Cache, unread
from rin.client.ingest.catalog import Catalog, ImageRow
from rin.client.ingest.pipeline import ingest
from rin.client.status import status
from rin.client.trainer import Trainer
from rin.common.errors import RefusedError, StateError
from tests.client.ingest.conftest import dicom_file as dicom_file  # a fixture of the folder beside

if TYPE_CHECKING:
    from tests.client.conftest import SmallSite

# (patient, instance, split, labels); the pixels of image i are all i.
IMAGES = [
    (b"b", b"3", "train", (5, 7)),
    (b"a", b"9", "train", (7,)),
    (b"b", b"1", "train", (8,)),
    (b"c", b"2", "val", (7,)),
    (b"a", b"4", "train", (5,)),
    (b"d", b"5", "train", ()),
]


def fill(home: Home, order: list[int]) -> None:
    catalog = Catalog(home.catalog)
    cache = Cache(home.cache, slots=0)
    for slot, number in enumerate(order):
        patient, instance, split, labels = IMAGES[number]
        row = ImageRow(
            patient * 16, b"s" * 16, b"t" * 16, instance * 16, 1, "MR", "brain", split, bytes([number]) * 16,
            "window", 8, 8, 12, "MONOCHROME2", "1.2.840.10008.1.2.1", False, labels,
        )  # fmt: skip
        catalog.add_image(b"p%d" % number, row, slot=slot)
    cache.append([bytes([number]) * IMAGE_BYTES for number in order])
    catalog.set_meta("slots", str(cache.slots))
    catalog.commit()
    catalog.close()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    fill(home, [0, 1, 2, 3, 4, 5])
    return home


def test_canonical_order_and_labels(home: Home) -> None:
    data = TrainingData.open(home, labels=[5, 7], split="train")
    assert (data.n_images, data.n_patients) == (3, 2)  # without label 8 and without the unlabelled one
    assert data.images(range(3))[:, 0, 0].tolist() == [4, 1, 0]
    assert data.patient.tolist() == [0, 0, 1]
    assert data.modality.tolist() == ["MR"] * 3
    assert data.anatomy.tolist() == ["brain"] * 3
    assert [data.labels_of(index).tolist() for index in range(3)] == [[5], [7], [5, 7]]
    targets = data.targets([2, 0])
    assert targets.shape == (2, 165)
    assert targets.dtype == np.float32
    assert [np.flatnonzero(row).tolist() for row in targets] == [[5, 7], [5]]
    batch = data.images(np.array([2, 2, 0]))
    assert (batch.shape, batch.dtype, batch.flags.writeable) == ((3, 256, 256), np.uint8, True)
    assert batch[:, 9, 9].tolist() == [0, 0, 4]


def test_the_order_of_ingestion_does_not_matter(home: Home, tmp_path: Path) -> None:
    other = Home(tmp_path / "other")
    fill(other, [5, 3, 0, 4, 2, 1])
    one, two = (TrainingData.open(each, labels=range(165), split="train") for each in (home, other))
    np.testing.assert_array_equal(one.images(range(one.n_images)), two.images(range(two.n_images)))
    np.testing.assert_array_equal(one.label_indices, two.label_indices)
    np.testing.assert_array_equal(one.patient, two.patient)


def test_empty_splits_and_missing_homes(home: Home, tmp_path: Path) -> None:
    data = TrainingData.open(home, labels=[5], split="test")
    assert (data.n_images, data.n_patients) == (0, 0)
    assert data.images([]).shape == (0, 256, 256)
    assert data.label_offsets.tolist() == [0]
    with pytest.raises(StateError, match="missing"):
        TrainingData.open(Home(tmp_path / "nobody"), labels=[5], split="train")
    home.cache.joinpath("shard-00000.u8").write_bytes(b"")
    with pytest.raises(StateError, match="holds less"):
        TrainingData.open(home, labels=[5], split="train")


def test_reading_needs_no_torch() -> None:
    code = "import sys, rin.client.data; sys.exit('torch' in sys.modules or 'pydicom' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_image_turns_black_while_it_is_read(dicom_file: Callable[..., Path], tmp_path: Path) -> None:
    """Ingest removes images beside a reader; their pixels go when the reader does."""
    home, pixels = Home(tmp_path / "site"), np.random.default_rng(3).integers(0, 900, (4, 16, 16)).astype(np.int16)
    labels = tmp_path / "labels.csv"
    labels.write_text("path,label\n" + "".join(f"{name},MR_brain_edema\n" for name in ("a.dcm", "b.dcm", "c.dcm")))
    for name, each in zip(("a.dcm", "b.dcm", "c.dcm"), pixels, strict=False):
        dicom_file(each, name=name)
    site = functools.partial(ingest, home, site="S", roots=[tmp_path / "archive"], labels=labels, workers=1)
    assert site().to_erase == 0
    data = TrainingData.open(home, labels=range(165), split=None)
    before = data.images(range(3))
    dicom_file(pixels[3], name="a.dcm", SOPInstanceUID="1.2.826.0.1.3680043.8.498.3.1")
    (tmp_path / "archive" / "b.dcm").unlink()
    report = site(prune=True)
    assert (report.to_erase, report.pruned, report.decoded) == (2, 1, 1)
    np.testing.assert_array_equal(data.images(range(3)), before)
    assert before.any(axis=(1, 2)).all()
    assert status(home)["catalog"]["images_to_erase"] == 2
    newer = TrainingData.open(home, labels=range(165), split=None)
    assert newer.images(range(newer.n_images)).any(axis=(1, 2)).tolist() == [True, True]
    del data, newer
    assert site().to_erase == 0
    slots = np.frombuffer(home.cache.joinpath("shard-00000.u8").read_bytes(), np.uint8).reshape(4, -1)
    assert int(slots.any(axis=1).sum()) == 2


def test_a_round_that_is_cancelled_reads_no_longer(small_site: Callable[..., SmallSite]) -> None:
    site = small_site()
    steps: list[bool] = []
    trainer = Trainer(site.home)

    def step(_: object) -> None:
        with unread(site.home.cache_lock) as free:
            steps.append(free)

    with contextlib.suppress(RefusedError):
        trainer.train(site.request(), site.plan_bytes, step, lambda: "cancelled" if steps else "")
    assert steps == [False]
    with unread(site.home.cache_lock) as free:
        assert free
