"""Whole files to pictures: functional groups, tables, palettes, odd encodings, damage, real archives."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence

from rin.client.ingest.dicom import Picture, pictures, read_header
from rin.client.ingest.reasons import Refused
from rin.client.ingest.skim import HEAD, skim

DicomFile = Callable[..., Path]
RAMP = np.tile(np.arange(256, dtype=np.uint16) * 8, (256, 1))
JPEG_LS = "1.2.840.10008.1.2.4.80"


def decode(path: Path, *, modality: str = "MR", frames: frozenset[int] | None = None) -> list[Picture]:
    header = skim(path.read_bytes()[:HEAD], size=path.stat().st_size)
    return list(pictures(path, modality=modality, frames=frames, header=header))


def image(picture: Picture) -> np.ndarray:
    assert picture.reason is None
    return np.frombuffer(picture.pixels, np.uint8).reshape(256, 256)


def item(**attributes: Any) -> Sequence:
    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return Sequence([dataset])


def test_functional_groups_shared_and_then_per_frame(dicom_file: DicomFile) -> None:
    shared = Dataset()
    shared.PixelValueTransformationSequence = item(RescaleSlope="2", RescaleIntercept="0", RescaleType="US")
    shared.FrameVOILUTSequence = item(WindowCenter="2048", WindowWidth="4096")
    shared.PixelMeasuresSequence = item(PixelSpacing=["1", "2"])
    own = Dataset()
    own.FrameVOILUTSequence = item(WindowCenter="512", WindowWidth="1024")
    path = dicom_file(
        np.stack([RAMP, RAMP]),
        SOPClassUID="1.2.840.10008.5.1.4.1.1.4.1",
        NumberOfFrames=2,
        WindowCenter="1",
        WindowWidth="2",
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence([Dataset(), own]),
    )
    first, second = decode(path)
    assert (first.frame, second.frame, first.policy) == (1, 2, "window")
    assert not image(first)[:64].any()  # pixels twice as wide as high: letter-boxed
    np.testing.assert_allclose(image(first)[128], RAMP[0] * 2 / 4095 * 255, atol=0.6)
    np.testing.assert_allclose(image(second)[128], np.clip(RAMP[0] * 2 / 1023, 0, 1) * 255, atol=0.6)


@pytest.mark.parametrize("wide", [True, False], ids=["16-bit entries", "8-bit entries"])
def test_look_up_tables_equal_pydicoms(dicom_file: DicomFile, wide: bool) -> None:
    count = 2048
    entries = (np.arange(count) ** 2 // 64).astype("<u2") if wide else (np.arange(count) // 8).astype(np.uint8)
    bits = 16 if wide else 8
    sequence = item(LUTDescriptor=[count, 0, bits], LUTData=entries.tobytes(), ModalityLUTType="US")
    path = dicom_file(RAMP, VOILUTSequence=sequence)
    dataset = pydicom.dcmread(path)
    (picture,) = decode(path)
    assert picture.policy == "voi-lut"
    reference = (apply_voi_lut(RAMP, dataset) if wide else entries[RAMP]).astype(float)  # pydicom wants 16 bits
    np.testing.assert_allclose(image(picture), reference / entries.max() * 255, atol=0.51)
    if wide:
        path = dicom_file(RAMP, ModalityLUTSequence=sequence, WindowCenter="20000", WindowWidth="30000")
        dataset = pydicom.dcmread(path)
        rescaled = apply_modality_lut(RAMP, dataset).astype(float)
        (picture,) = decode(path)
        np.testing.assert_allclose(image(picture), np.clip((rescaled - 19999.5) / 29999 + 0.5, 0, 1) * 255, atol=0.6)


def test_palette_colour_is_looked_up() -> None:
    path = Path(str(get_testdata_file("examples_palette.dcm")))
    (picture,) = decode(path, modality="US")
    dataset = pydicom.dcmread(path)
    rgb = apply_color_lut(dataset.pixel_array, dataset) >> 8
    luma = rgb.astype(float) @ [0.299, 0.587, 0.114]
    got = image(picture)
    assert got[got > 0].mean() == pytest.approx(luma[luma > 0].mean(), rel=0.25)


def test_deflated_data_sets_are_read_and_bounded(dicom_file: DicomFile, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dicom_file(RAMP, syntax="1.2.840.10008.1.2.1.99", WindowCenter="1024", WindowWidth="2048")
    assert image(decode(path)[0])[0, 255] == 254
    monkeypatch.setattr("rin.client.ingest.dicom.INFLATED", 1 << 20)
    bomb = dicom_file(RAMP, syntax="1.2.840.10008.1.2.1.99", name="bomb.dcm")
    data = bomb.read_bytes()
    start = 144 + int.from_bytes(data[140:144], "little")
    squeeze = zlib.compressobj(9, wbits=-15)
    packed = squeeze.compress(bytes(64 << 20)) + squeeze.flush()
    bomb.write_bytes(data[:start] + packed)
    with pytest.raises(Refused, match="too-large"):
        decode(bomb)


def test_big_endian_equals_little_endian(dicom_file: DicomFile) -> None:
    little = dicom_file(RAMP)
    big = dicom_file(RAMP.astype(">u2"), syntax="1.2.840.10008.1.2.2", BitsAllocated=16, BitsStored=16, HighBit=15)
    assert decode(big) == decode(little)
    names = ("SC_rgb_small_odd.dcm", "SC_rgb_small_odd_big_endian.dcm")
    odd = [decode(Path(str(get_testdata_file(name)))) for name in names]
    assert odd[0] == odd[1]


def test_multi_frame_fragments_and_wanted_frames(dicom_file: DicomFile) -> None:
    import imagecodecs

    frames = [np.roll(RAMP, 20 * shift, 1) for shift in range(3)]
    stack = np.stack(frames)
    path = dicom_file(
        stack, syntax=JPEG_LS, frames=[imagecodecs.jpegls_encode(frame) for frame in frames], NumberOfFrames=3
    )
    plain = decode(dicom_file(stack, NumberOfFrames=3))
    assert decode(path) == plain
    assert len({picture.pixels for picture in plain}) == 3
    assert decode(path, frames=frozenset({3})) == plain[2:]
    assert decode(path, frames=frozenset({9})) == []


def test_whole_frames_before_the_end_are_kept(dicom_file: DicomFile) -> None:
    path = dicom_file(np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]]), NumberOfFrames=3)
    path.write_bytes(path.read_bytes()[: -RAMP.nbytes - 50])
    assert [picture.reason for picture in decode(path)] == [None, "truncated", "truncated"]


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"Rows": 0}, "bad-header"),
        ({"Rows": None}, "bad-header"),
        ({"BitsStored": 40}, "bad-header"),
        ({"RescaleSlope": "0", "RescaleIntercept": "0"}, "bad-rescale"),
        ({"Rows": 65535, "Columns": 65535}, "too-large"),
        ({"NumberOfFrames": 100000}, "too-large"),
        ({"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}, "unsupported-pixels"),
        ({"PhotometricInterpretation": "CMYK"}, "unsupported-pixels"),
        ({"SamplesPerPixel": 2}, "bad-header"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_headers_that_cannot_be_drawn(dicom_file: DicomFile, attributes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        decode(dicom_file(RAMP, **attributes))


@pytest.mark.parametrize("text", ["1A", "1,5", "4O", "1_5", "inf"])
def test_wrong_decimal_strings_have_a_reason(dicom_file: DicomFile, text: str) -> None:
    """pydicom raises ValueError, UFuncTypeError and TypeError at these."""
    path = dicom_file(RAMP, RescaleSlope="135", RescaleIntercept="0")
    path.write_bytes(path.read_bytes().replace(b"135 ", text.ljust(4).encode()))
    with pytest.raises(Refused, match="bad-rescale"):
        decode(path)


def test_a_file_without_transfer_syntax_or_preamble_is_read(dicom_file: DicomFile) -> None:
    path = dicom_file(RAMP)
    expected = decode(path)
    data = path.read_bytes()
    at = data.index(b"\x02\x00\x10\x00UI")
    without = data[:at] + data[at + 8 + int.from_bytes(data[at + 6 : at + 8], "little") :]
    path.write_bytes(without)
    assert decode(path) == expected
    path.write_bytes(data[132:])
    assert decode(path) == expected


def test_the_same_picture_through_pydicom_as_through_the_fast_path(dicom_file: DicomFile) -> None:
    path = dicom_file(RAMP.astype(np.int16), RescaleSlope="1", RescaleIntercept="-1024", PixelSpacing=["1", "1.3"])
    assert list(pictures(path, modality="CT", header=None)) == decode(path, modality="CT")
    header = read_header(path)
    assert header.from_dataset
    assert header.number("RescaleIntercept") == -1024


def test_one_mr_in_seven_transfer_syntaxes_is_one_picture(real_data: Path) -> None:
    paths = sorted((real_data / "dicom" / "mr-transfer-syntaxes" / "In").glob("*.dcm"))
    syntaxes = {read_header(path).syntax for path in paths}
    assert len(syntaxes) == 7
    assert len({decode(path)[0].pixels for path in paths}) == 1


def test_real_enhanced_mr_takes_window_and_rescale_from_its_groups(real_data: Path) -> None:
    for folder, frames in (("xa10", 6), ("vida", 25), ("agfa", 25)):
        path = sorted((real_data / "dicom" / "mr-enhanced" / folder).iterdir())[0]
        dataset, got = pydicom.dcmread(path), decode(path)
        assert [picture.policy for picture in got] == ["window"] * frames
        groups = dataset.PerFrameFunctionalGroupsSequence[3]
        transform, window = groups.PixelValueTransformationSequence[0], groups.FrameVOILUTSequence[0]
        values = dataset.pixel_array[3] * float(transform.RescaleSlope) + float(transform.RescaleIntercept)
        low = float(window.WindowCenter) - 0.5 - (float(window.WindowWidth) - 1) / 2
        expected = np.clip((values - low) / (float(window.WindowWidth) - 1), 0, 1) * 255
        assert np.corrcoef(image(got[3])[2::4, 2::4].ravel(), expected.ravel())[0, 1] > 0.99
        assert image(got[3]).mean() == pytest.approx(expected.mean(), rel=0.02)


def test_real_structural_mr_is_upright_bright_on_black_and_whole(real_data: Path) -> None:
    path = real_data / "dicom" / "mr-structural" / "dicoms" / "N2D_0181.dcm"
    (picture,) = decode(path)
    assert picture.policy == "percentile"
    got = image(picture)
    assert not got[0].any() or got[0].mean() < 20
    width = round(274 * 0.699987828731537 / (384 * 0.666666686534882) * 256)
    columns = np.flatnonzero(got.any(0))
    assert columns[-1] - columns[0] + 1 <= width
    assert got[96:160, 96:160].mean() > 3 * got[:, :40].mean()


def test_elements_after_the_pixels_are_no_pixels(dicom_file: DicomFile) -> None:
    path = dicom_file(RAMP, NumberOfFrames=2, DataSetTrailingPadding=bytes(2 * RAMP.nbytes))
    assert [picture.reason for picture in decode(path)] == [None, "truncated"]
