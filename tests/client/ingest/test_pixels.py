"""Stored values are right for every layout and codec that archives hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.encaps import generate_frames
from pydicom.pixels.utils import pixel_array

from rin.client.ingest.dicom import read_header
from rin.client.ingest.pixels import LUMA, Layout, compressed, layout_of, native, stored_values
from rin.client.ingest.reasons import Refused

LE = "1.2.840.10008.1.2.1"
GREY16 = Layout(6, 8, 1, 1, "MONOCHROME2", False, 16, 16, 15, False, LE)
SIGNED = dataclasses.replace(GREY16, signed=True)
RGB = Layout(6, 8, 1, 3, "RGB", False, 8, 8, 7, False, LE)
VALUES = (np.arange(48, dtype=np.int16).reshape(6, 8) - 24) * 40


@pytest.fixture
def image(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 255, (6, 8, 3), np.uint8)


@pytest.mark.parametrize("encode", [imagecodecs.jpegls_encode, imagecodecs.ljpeg_encode], ids=["JPEG-LS", "lossless"])
def test_signed_images_of_codecs_that_know_no_sign_are_reinterpreted(encode: Callable[..., bytes]) -> None:
    decoded = compressed(encode(VALUES.view(np.uint16)), SIGNED)
    assert decoded.dtype == np.int16
    np.testing.assert_array_equal(decoded, VALUES)


def test_jpeg2000_carries_its_sign() -> None:
    stream = imagecodecs.jpeg2k_encode(VALUES, reversible=True, codecformat="J2K")
    np.testing.assert_array_equal(compressed(stream, SIGNED), VALUES)


@pytest.mark.parametrize("stored", [12, 13, 14])
def test_sign_is_extended_from_the_stored_bits(stored: int) -> None:
    layout = dataclasses.replace(SIGNED, stored=stored, high=stored - 1)
    cut = VALUES.view(np.uint16) & ((1 << stored) - 1)
    np.testing.assert_array_equal(native(cut.tobytes(), layout), VALUES)
    np.testing.assert_array_equal(compressed(imagecodecs.jpegls_encode(cut), layout), VALUES)


def test_an_overlay_in_the_high_bits_is_masked() -> None:
    layout = dataclasses.replace(GREY16, stored=12, high=11)
    values = np.abs(VALUES).astype(np.uint16)
    np.testing.assert_array_equal(native((values | 0xF000).tobytes(), layout), values)


def test_stored_bits_above_the_lowest_are_shifted_down() -> None:
    layout = dataclasses.replace(GREY16, stored=12, high=15)
    values = np.abs(VALUES).astype(np.uint16)
    np.testing.assert_array_equal(native(((values << 4) | 0x3).tobytes(), layout), values)
    signed = dataclasses.replace(layout, signed=True)
    np.testing.assert_array_equal(native((VALUES << 4).tobytes(), signed), VALUES)


def test_a_grey_8_bit_codestream_under_a_16_bit_header() -> None:
    layout = dataclasses.replace(SIGNED, stored=8, high=7)
    values = np.array([[-128, -1, 0, 127]], np.int8).repeat(2, 0).repeat(2, 1)
    layout = dataclasses.replace(layout, rows=2, cols=8)
    np.testing.assert_array_equal(compressed(imagecodecs.jpegls_encode(values.view(np.uint8)), layout), values)


def test_planar_and_interleaved_colour_give_the_same_grey(image: np.ndarray) -> None:
    expected = np.rint(image.astype(np.float32) @ LUMA)
    np.testing.assert_array_equal(native(image.tobytes(), RGB), expected)
    planar = dataclasses.replace(RGB, planar=True)
    np.testing.assert_array_equal(native(np.moveaxis(image, -1, 0).tobytes(), planar), expected)


def test_the_luma_of_ybr_is_the_grey(image: np.ndarray) -> None:
    full = dataclasses.replace(RGB, photometric="YBR_FULL")
    np.testing.assert_array_equal(native(image.tobytes(), full), image[..., 0])
    pairs = image.reshape(6, 4, 2, 3)
    subsampled = np.stack([pairs[:, :, 0, 0], pairs[:, :, 1, 0], pairs[:, :, 0, 1], pairs[:, :, 0, 2]], -1)
    half = dataclasses.replace(RGB, photometric="YBR_FULL_422")
    assert half.frame_bytes == subsampled.size
    np.testing.assert_array_equal(native(subsampled.tobytes(), half), image[..., 0])


def test_jpeg_colour_follows_its_markers_and_then_the_header() -> None:
    red = np.zeros((8, 8, 3), np.uint8) + np.array([200, 30, 60], np.uint8)
    grey = round(float(np.array([200, 30, 60]) @ LUMA))
    layout = dataclasses.replace(RGB, rows=8, cols=8)
    for space in ("YCBCR", "RGB"):
        stream = imagecodecs.jpeg8_encode(red, level=98, colorspace="RGB", outcolorspace=space)
        for photometric in ("RGB", "YBR_FULL_422"):
            got = compressed(stream, dataclasses.replace(layout, photometric=photometric))
            assert abs(int(got.mean()) - grey) <= 2, (space, photometric)


def test_16_bit_colour_becomes_8_bits(image: np.ndarray) -> None:
    layout = dataclasses.replace(RGB, allocated=16, stored=16, high=15)
    wide = image.astype(np.uint16) * 257
    got = native(wide.tobytes(), layout).astype(int)
    assert np.abs(got - np.rint(image.astype(np.float32) @ LUMA)).max() <= 1


@pytest.mark.parametrize(
    ("frame", "layout", "reason"),
    [
        (b"no codestream at all", SIGNED, "unsupported-syntax"),
        (b"no codestream at all", dataclasses.replace(SIGNED, syntax="1.2.840.10008.1.2.4.70"), "codec-error"),
        (imagecodecs.jpegls_encode(np.zeros((6, 9), np.uint16)), GREY16, "codec-mismatch"),
        (imagecodecs.jpegls_encode(VALUES.view(np.uint16))[:60], GREY16, "truncated"),
        (bytes(10), dataclasses.replace(GREY16, syntax="1.2.840.10008.1.2.5"), "truncated"),
        (bytes(64), dataclasses.replace(GREY16, syntax="1.2.840.10008.1.2.5"), "codec-mismatch"),
    ],
    ids=["nothing", "wrong", "size", "cut", "rle cut", "rle planes"],
)
def test_frames_that_cannot_be_decoded(frame: bytes, layout: Layout, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        compressed(frame, layout)


def test_a_corrupt_codestream_is_an_error_and_no_picture() -> None:
    stream = bytearray(imagecodecs.jpeg2k_encode(VALUES.view(np.uint16), codecformat="J2K"))
    stream[60:90] = bytes(30)
    with pytest.raises(Refused, match="codec-error"):
        compressed(bytes(stream), GREY16)


def test_the_codestream_wins_over_a_wrong_transfer_syntax() -> None:
    wrong = dataclasses.replace(SIGNED, syntax="1.2.840.10008.1.2.4.90")
    np.testing.assert_array_equal(compressed(imagecodecs.jpegls_encode(VALUES.view(np.uint16)), wrong), VALUES)


def test_native_data_that_ends_early_is_truncated() -> None:
    with pytest.raises(Refused, match="truncated"):
        native(VALUES.tobytes()[:-1], SIGNED)


def test_unsigned_view_of_signed_samples() -> None:
    samples = np.array([[-1]], np.int16)  # a JPEG 2000 stream that calls itself signed under an unsigned header
    assert stored_values(samples, dataclasses.replace(GREY16, stored=12, high=11)).tolist() == [[4095]]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_equal_to_pydicom_on_every_grey_file_of_its_wheel(wheel_files: list[Path]) -> None:
    """Bit for bit: RLE, JPEG 2000 (also with a wrong sign), big and little endian, 8 to 32 bits, rescued or not."""
    compared = 0
    for path in wheel_files:
        try:
            layout, dataset = layout_of(read_header(path)), pydicom.dcmread(path, force=True)
            reference = np.atleast_3d(dataset.pixel_array)
        except (Refused, AttributeError, ValueError, RuntimeError, NotImplementedError, KeyError):
            continue
        if layout.samples != 1 or layout.photometric == "PALETTE COLOR" or layout.syntax.endswith(".99"):
            continue
        reference = dataset.pixel_array.reshape(layout.frames, layout.rows, layout.cols)
        if layout.syntax in (LE, "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"):
            got = native(dataset.PixelData, layout)
        else:
            got = compressed(next(generate_frames(dataset.PixelData, number_of_frames=layout.frames)), layout)
        np.testing.assert_array_equal(got.astype(np.int64), reference[0].astype(np.int64), err_msg=path.name)
        compared += 1
    assert compared >= 45


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_rle.dcm",
        "SC_rgb_gdcm_KY.dcm",
        "SC_rgb_dcmtk_+eb+cr.dcm",
        "SC_rgb_jpeg_dcmtk.dcm",
        "SC_rgb_jpeg_app14_dcmd.dcm",
        "SC_jpeg_no_color_transform.dcm",
        "SC_jpeg_no_color_transform_2.dcm",
        "examples_jpeg2k.dcm",
    ],
)
def test_close_to_the_luma_of_pydicoms_rgb(name: str) -> None:
    """YBR to RGB rounds and clips on the way, the luma itself does not: a few grey levels at hard edges."""
    path = Path(str(get_testdata_file(name)))
    dataset = pydicom.dcmread(path)
    layout = layout_of(read_header(path))
    got = compressed(next(generate_frames(dataset.PixelData, number_of_frames=layout.frames)), layout)
    reference = np.rint(pixel_array(dataset, index=0).astype(np.float32) @ LUMA)
    difference = np.abs(got.astype(np.float32) - reference)
    assert difference.mean() < 0.4
    assert difference.max() <= 8


def test_12_bit_jpeg_extended_is_decoded() -> None:
    """No pydicom plug-in does; its JPEG 2000 file of the same bone scan is strongly compressed."""
    twelve, other = (Path(str(get_testdata_file(name))) for name in ("JPGExtended.dcm", "JPEG2000.dcm"))
    dataset = pydicom.dcmread(twelve)
    got = compressed(next(generate_frames(dataset.PixelData)), layout_of(read_header(twelve)))
    assert got.dtype == np.uint16
    reference = pydicom.dcmread(other).pixel_array
    assert np.corrcoef(got.ravel(), reference.ravel())[0, 1] > 0.95
