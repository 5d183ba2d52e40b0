"""Small real DICOM files, written by pydicom, and homes to ingest them into."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom.data
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian

from rin.client.home import Home
from tests.client.ingest.radimagenet_tree import Tree, write_tree

CT = "1.2.840.10008.5.1.4.1.1.2"
ROOT_UID = "1.2.826.0.1.3680043.8.498"
DicomFile = Callable[..., Path]


def data_set(pixels: np.ndarray, number: int, **attributes: Any) -> Dataset:
    """A CT image of one patient; `attributes` replace or (None) remove what stands here."""
    colour = pixels.ndim >= 3 and pixels.shape[-1] == 3
    bits = pixels.dtype.itemsize * 8
    values: dict[str, Any] = {
        "SOPClassUID": CT,
        "SOPInstanceUID": f"{ROOT_UID}.3.{number}",
        "StudyInstanceUID": f"{ROOT_UID}.1.1",
        "SeriesInstanceUID": f"{ROOT_UID}.2.1",
        "InstanceNumber": number,
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "PatientID": "P1",
        "PatientName": "CANARY^NAME",
        "StudyDate": "20200229",
        "Rows": pixels.shape[-3] if colour else pixels.shape[-2],
        "Columns": pixels.shape[-2] if colour else pixels.shape[-1],
        "SamplesPerPixel": 3 if colour else 1,
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
        "PlanarConfiguration": 0 if colour else None,
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
    }
    dataset = Dataset()
    for keyword, value in (values | attributes).items():
        if value is not None:
            setattr(dataset, keyword, value)
    return dataset


@pytest.fixture
def dicom_file(tmp_path: Path) -> DicomFile:
    """Write one file: `dicom_file(pixels, name=..., syntax=..., frames=[codestreams], **attributes)`.

    `pixels` gives type and size; with `frames` the compressed bytes are stored instead of it.
    """
    numbers = itertools.count(1)

    def write(
        pixels: np.ndarray,
        *,
        name: str = "",
        syntax: str = ExplicitVRLittleEndian,
        frames: list[bytes] | None = None,
        **attributes: Any,
    ) -> Path:
        number = next(numbers)
        dataset = data_set(pixels, number, **attributes)
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = UID(syntax)
        dataset.PixelData = pixels.tobytes() if frames is None else encapsulate(frames)
        dataset["PixelData"].VR = "OB" if frames is not None or pixels.dtype.itemsize == 1 else "OW"
        dataset["PixelData"].is_undefined_length = frames is not None
        path = tmp_path / "archive" / (name or f"{number}.dcm")
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path, enforce_file_format=True)
        return path

    return write


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture(scope="session")
def wheel_files() -> list[Path]:
    """The test files that ship inside pydicom's wheel; nothing is downloaded."""
    folder = Path(pydicom.data.__file__).parent / "test_files"
    return sorted(path for path in folder.rglob("*") if path.is_file() and "TINY_ALPHA" not in path.parts)


def texture(rng: np.random.Generator, rows: int, cols: int, high: int = 4096) -> np.ndarray:
    """A smooth gradient with noise, 0..high, float64."""
    y, x = np.mgrid[:rows, :cols]
    noise = rng.normal(0, 0.03, (rows, cols))
    return np.clip((y / rows + x / cols) / 2 + noise, 0, 1) * (high - 1)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Two images a class in the published folders."""
    return write_tree(tmp_path / "data", images=2, side=48)
