"""The archives: the same bytes for the same seed, every syntax decodable, damage and canaries as recorded."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.errors import InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from rin.common.errors import StateError
from rin.common.labels import label_index
from rin.server.archive import ArchiveFacts, write_archive
from rin.server.damage import DAMAGE
from rin.server.scanners import SITES
from rin.server.syntaxes import COLOUR_SYNTAXES, ENCODERS, GREY_SYNTAXES, encode_rle, set_pixels

PATIENTS = 30


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> ArchiveFacts:
    return write_archive("siteB", tmp_path_factory.mktemp("archives"), seed=3, patients=PATIENTS)


@pytest.fixture(scope="module")
def record(archive: ArchiveFacts) -> dict[str, Any]:
    return json.loads(archive.canaries.read_text())


def _files(archive: ArchiveFacts) -> list[Path]:
    return sorted(path for path in (archive.root / "dicom").rglob("*") if path.is_file())


def test_counts(archive: ArchiveFacts, record: dict[str, Any]) -> None:
    assert len(_files(archive)) == archive.files
    assert 0.015 <= sum(archive.damaged.values()) / archive.files <= 0.03
    assert set(record["damaged_files"].values()) == set(archive.damaged) <= set(DAMAGE)
    assert len(record["damaged_files"]) == sum(archive.damaged.values())
    assert set(archive.extras) == {"localizer", "structured-report", "secondary-capture"}
    assert archive.files == sum(archive.syntaxes.values()) + sum((*archive.damaged.values(), *archive.extras.values()))


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    facts = [
        write_archive("siteC", tmp_path / "a", seed=9, patients=3, progress=lambda *step: seen.append(step)),
        write_archive("siteC", tmp_path / "b", seed=9, patients=3),
        write_archive("siteC", tmp_path / "c", seed=10, patients=3),
    ]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    trees = [
        {str(path.relative_to(fact.root)): path.read_bytes() for path in fact.root.rglob("*") if path.is_file()}
        for fact in facts
    ]
    assert trees[0] == trees[1] != trees[2]
    assert facts[0].canaries.read_bytes() == facts[1].canaries.read_bytes()


def test_an_archive_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "siteA").mkdir()
    with pytest.raises(StateError):
        write_archive("siteA", tmp_path, seed=1, patients=1)


def test_what_an_interrupted_run_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".siteA.part" / "dicom").mkdir(parents=True)
    (tmp_path / ".siteA.part" / "dicom" / "old").write_text("old")
    facts = write_archive("siteA", tmp_path, seed=1, patients=1)
    assert not (facts.root / "dicom" / "old").exists() and not (tmp_path / ".siteA.part").exists()


def test_every_syntax_is_there_and_decodes(archive: ArchiveFacts, record: dict[str, Any]) -> None:
    assert set(archive.syntaxes) == set(GREY_SYNTAXES) | set(COLOUR_SYNTAXES)
    decode = {
        JPEGLSLossless: imagecodecs.jpegls_decode,
        JPEGLosslessSV1: imagecodecs.jpeg8_decode,
        JPEG2000Lossless: imagecodecs.jpeg2k_decode,
        JPEGBaseline8Bit: imagecodecs.jpeg8_decode,
    }
    met = set()
    for path in _files(archive):
        if str(path.relative_to(archive.root)) in record["damaged_files"]:
            continue
        image = pydicom.dcmread(path)
        syntax = image.file_meta.TransferSyntaxUID
        if "PixelData" not in image or syntax in met:
            continue
        met.add(syntax)
        if syntax in decode:
            frames = list(generate_frames(image.PixelData, number_of_frames=int(image.get("NumberOfFrames", 1))))
            assert all(decode[syntax](frame).shape[:2] == (image.Rows, image.Columns) for frame in frames)
        else:
            assert image.pixel_array.size
    assert met == set(archive.syntaxes)


@pytest.mark.parametrize("kind", [np.int16, np.uint16, np.uint8])
@pytest.mark.parametrize("syntax", [s for s in ENCODERS if s != JPEGBaseline8Bit])
def test_lossless_syntaxes_are_bit_exact(syntax: str, kind: type) -> None:
    rng = np.random.default_rng(0)
    low, high = (-1024, 3000) if kind is np.int16 else (0, 256 if kind is np.uint8 else 4096)
    frame = rng.integers(low, high, (23, 31)).astype(kind)
    frame[5:12] = frame[5, 0]  # runs as well as noise
    codec: dict[str, Any] = {
        JPEGLSLossless: imagecodecs.jpegls_decode,
        JPEGLosslessSV1: imagecodecs.jpeg8_decode,
        JPEG2000Lossless: imagecodecs.jpeg2k_decode,
    }
    coded = ENCODERS[syntax](frame)
    if syntax in codec:
        assert np.array_equal(codec[syntax](coded).view(kind), frame)
        return
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = RLELossless
    image.PhotometricInterpretation = "MONOCHROME2"
    set_pixels(image, frame[None], RLELossless, bits=frame.dtype.itemsize * 8)
    assert np.array_equal(get_decoder(RLELossless).as_array(image, raw=True)[0], frame)


def test_rle_of_colour_is_bit_exact() -> None:
    frame = np.random.default_rng(1).integers(0, 40, (17, 9, 3)).astype(np.uint8) // 13
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = RLELossless
    set_pixels(image, frame[None], RLELossless, bits=8)
    assert encode_rle(frame)[:4] == b"\x03\0\0\0"
    assert np.array_equal(get_decoder(RLELossless).as_array(image, raw=True)[0], frame)


def test_the_traps_of_the_headers_occur(archive: ArchiveFacts, record: dict[str, Any]) -> None:
    met: set[str] = set()
    for path in _files(archive):
        if str(path.relative_to(archive.root)) in record["damaged_files"]:
            continue
        image = pydicom.dcmread(path, stop_before_pixels=True)
        met.add(f"{image.Modality} {image.get('PhotometricInterpretation')}")
        if image.Modality == "CT" and "LOCALIZER" not in image.ImageType:
            assert image.PixelRepresentation == 1 and image.RescaleType == "HU"
            met.add("padding" if "PixelPaddingValue" in image else "no padding")
        if image.Modality == "MR":
            assert (image.BitsAllocated, image.BitsStored) == (16, 12)
            met.add("window" if "WindowCenter" in image else "no window")
        if image.get("NumberOfFrames", 1) > 1:
            met.add("cine")
    assert met >= {"MR MONOCHROME1", "MR MONOCHROME2", "US RGB", "US YBR_FULL_422", "padding", "no padding"}
    assert met >= {"window", "no window", "cine"}


def test_canaries_are_where_the_record_says(archive: ArchiveFacts, record: dict[str, Any]) -> None:
    data = [path.read_bytes() for path in _files(archive)]
    told = b"".join(octets[: octets.rfind(b"\xe0\x7f\x10\x00")] for octets in data)  # the headers
    told += "\n".join(str(path) for path in _files(archive)).encode()
    damaged = len(record["damaged_files"])
    missing = [text for text in record["canaries"] if text.encode() not in told]
    assert all("CANARY" in text for text in record["canaries"])
    burned = [text for text in missing if "BURN" in text or "PAGE" in text]
    assert len(missing) - len(burned) <= damaged  # a damaged file may have held the only copy
    assert len(burned) == 1 + archive.extras["secondary-capture"]
    assert record["uid_root"].encode() in told and record["burned_in"].startswith(record["uid_root"])


def test_label_and_mapping_tables(archive: ArchiveFacts) -> None:
    with (archive.root / "mapping.csv").open(encoding="utf-8") as file:
        mapping = list(csv.DictReader(file))
    assert list(mapping[0]) == ["modality", "body_part", "local_label", "coding_scheme", "rin_class"]
    assert {row["rin_class"] for row in mapping} <= set(label_index())
    with (archive.root / "labels.csv").open(encoding="utf-8") as file:
        labels = list(csv.DictReader(file))
    assert list(labels[0]) == ["sop_instance_uid", "frame", "label"]
    known = {row["local_label"] for row in mapping}
    unknown = {row["label"] for row in labels} - known
    assert unknown <= set(SITES["siteB"].unknown)
    images = [(row["sop_instance_uid"], row["frame"]) for row in labels]
    assert len(set(images)) < len(images)  # some have two labels
    assert max(int(row["frame"]) for row in labels) > 1 and min(int(row["frame"]) for row in labels) == 1


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_cannot_be_read(kind: str, tmp_path: Path) -> None:
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.SOPClassUID, image.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", "1.2.3"
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if DAMAGE[kind][1] == "native" else JPEG2000Lossless
    image.PhotometricInterpretation = "MONOCHROME2"
    set_pixels(image, np.full((1, 64, 48), 7, np.uint16), image.file_meta.TransferSyntaxUID, bits=12)
    path = tmp_path / "image.dcm"
    image.save_as(path, enforce_file_format=True)
    assert pydicom.dcmread(path).pixel_array.shape == (64, 48)
    path.write_bytes(DAMAGE[kind][0](path.read_bytes(), np.random.default_rng(2)))
    with pytest.raises((InvalidDicomError, ValueError, AttributeError, EOFError, RuntimeError)):
        _ = pydicom.dcmread(path).pixel_array
