"""The skimmed header says what pydicom says, or leaves the file to it; hostile bytes cost nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from rin.client.ingest.dicom import read_header
from rin.client.ingest.header import EXPLICIT_LE, TAGS, VOI_LUT, Header
from rin.client.ingest.reasons import Refused
from rin.client.ingest.skim import HEAD, skim

_GOOD = Path(str(get_testdata_file("CT_small.dcm"))).read_bytes()[:2000]
PIXELS = np.arange(64, dtype=np.int16).reshape(8, 8)


def skim_file(path: Path) -> Header | None:
    return skim(path.read_bytes()[:HEAD], size=path.stat().st_size)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_agrees_with_pydicom_on_every_file_of_its_wheel(wheel_files: list[Path]) -> None:
    compared = 0
    for path in wheel_files:
        try:
            quick, slow = skim_file(path), read_header(path)
        except Refused:
            continue
        if quick is not None:
            assert {k: quick.raw(k) for k in TAGS} == {k: slow.raw(k) for k in TAGS}, path.name
            assert (quick.syntax, quick.meaning) == (slow.syntax, slow.meaning), path.name
            compared += 1
    assert compared > 80


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_every_native_encoding(dicom_file: Callable[..., Path], syntax: str) -> None:
    pixels = PIXELS.astype(">i2") if syntax == ExplicitVRBigEndian else PIXELS
    header = skim_file(dicom_file(pixels, syntax=syntax, RescaleSlope="2.5"))
    assert header is not None
    assert (header.word("Rows"), header.number("RescaleSlope"), header.syntax) == (8, 2.5, syntax)
    assert header.pixel_length == PIXELS.nbytes
    assert header.padding("PixelPaddingValue", signed=True) is None


def test_walks_over_sequences_of_undefined_length_and_notes_those_that_matter(dicom_file: Callable[..., Path]) -> None:
    inner = Dataset()
    inner.CodeValue = "X"
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = Sequence([inner])
    item["PurposeOfReferenceCodeSequence"].is_undefined_length = True
    item.is_undefined_length_sequence_item = True
    lut = Dataset()
    lut.LUTDescriptor = [2, 0, 16]
    lut.LUTData = b"\0\0\xff\xff"
    sequence = Sequence([item])
    sequence.is_undefined_length = True
    path = dicom_file(PIXELS, SourceImageSequence=sequence, VOILUTSequence=Sequence([lut]))
    header = skim_file(path)
    assert header is not None
    assert header.meaning == {VOI_LUT}
    assert header.word("Columns") == 8


def test_long_headers_before_the_pixels_are_left_incomplete(dicom_file: Callable[..., Path]) -> None:
    header = skim_file(dicom_file(PIXELS, RequestAttributesSequence=[], EncapsulatedDocument=bytes(2 * HEAD)))
    assert header is not None
    assert not header.complete
    assert header.pixel_offset is None


def test_no_preamble_is_taken_only_if_it_says_dicom(dicom_file: Callable[..., Path]) -> None:
    data = dicom_file(PIXELS).read_bytes()
    header = skim(data[132:], size=len(data) - 132)
    assert header is not None
    assert header.word("Rows") == 8
    for other in (b"GIF89a" + bytes(100), b"\x08\x00" + b"text that is no data set at all", bytes(500)):
        with pytest.raises(Refused, match="not-dicom"):
            skim(other, size=len(other))
    with pytest.raises(Refused, match="empty"):
        skim(b"", size=0)


def test_missing_transfer_syntax_is_guessed_from_the_encoding(dicom_file: Callable[..., Path]) -> None:
    for syntax in (EXPLICIT_LE, ImplicitVRLittleEndian):
        data = dicom_file(PIXELS, syntax=syntax).read_bytes()
        at = data.index(b"\x02\x00\x10\x00UI")
        data = data[:at] + data[at + 8 + int.from_bytes(data[at + 6 : at + 8], "little") :]
        header = skim(data, size=len(data))
        assert header is not None
        assert header.syntax == syntax


def test_deep_nesting_is_left_to_pydicom_in_its_process() -> None:
    nest = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    data = bytes(128) + b"DICM" + b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\0" + nest * 2000
    assert skim(data[:HEAD], size=len(data)) is None


@given(st.binary(max_size=400), st.booleans())
def test_random_bytes_give_a_header_or_a_reason(data: bytes, marked: bool) -> None:
    data = bytes(128) + b"DICM" + data if marked else data
    try:
        header = skim(data, size=len(data))
    except Refused:
        return
    if header is not None:
        for keyword in TAGS:
            assert len(header.texts(keyword)) == len(header.numbers(keyword))
            header.word(keyword)


@given(st.lists(st.tuples(st.integers(132, 900), st.integers(0, 255)), min_size=1, max_size=6), st.integers(140, 1000))
def test_damaged_headers_never_raise_anything_else(changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(_GOOD)
    for at, value in changes:
        data[at % len(data)] = value
    data = data[:length]
    with contextlib.suppress(Refused):
        skim(bytes(data), size=len(data))
