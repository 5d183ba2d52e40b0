"""Frames into DICOM pixel data: the transfer syntaxes in which the phantom archives are written."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

import imagecodecs
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

Frame = npt.NDArray[Any]  # uint8, uint16 or int16; (rows, columns) or (rows, columns, 3)


def encode_rle(frame: Frame) -> bytes:
    """One frame as RLE segments: byte planes, most significant first, colour by colour (PS3.5 Annex G)."""
    samples = frame if frame.ndim == 3 else frame[..., None]
    segments = []
    for sample in range(samples.shape[2]):
        octets = np.ascontiguousarray(samples[..., sample]).view(np.uint8).reshape(*frame.shape[:2], -1)
        for byte in reversed(range(octets.shape[2])):
            packed = imagecodecs.packbits_encode(np.ascontiguousarray(octets[..., byte]))
            segments.append(packed + b"\0" * (len(packed) % 2))
    starts = 64 + np.cumsum([0, *(len(segment) for segment in segments[:-1])])
    offsets = [int(start) for start in starts] + [0] * (15 - len(segments))
    return struct.pack("<16I", len(segments), *offsets) + b"".join(segments)


def _unsigned(frame: Frame) -> Frame:
    """The same bits read as unsigned samples: codecs but JPEG 2000 know no sign (PS3.5 8.2.1, 8.2.3)."""
    return np.ascontiguousarray(frame).view(np.uint16) if frame.dtype == np.int16 else np.ascontiguousarray(frame)


def encode_jpeg_lossless(frame: Frame) -> bytes:
    """JPEG lossless, process 14, selection value 1 (PS3.5 8.2.1)."""
    samples = _unsigned(frame)
    return bytes(
        imagecodecs.jpeg8_encode(samples, lossless=True, predictor=1, bitspersample=samples.dtype.itemsize * 8)
    )


def encode_jpeg_baseline(frame: Frame) -> bytes:
    """An RGB frame as 8-bit YCbCr JPEG with halved columns of chroma."""
    return bytes(imagecodecs.jpeg8_encode(frame, level=92, colorspace="RGB", outcolorspace="YCBCR", subsampling="422"))


ENCODERS: Final[dict[str, Callable[[Frame], bytes]]] = {
    RLELossless: encode_rle,
    JPEGLSLossless: lambda frame: bytes(imagecodecs.jpegls_encode(_unsigned(frame))),
    JPEG2000Lossless: lambda frame: bytes(
        imagecodecs.jpeg2k_encode(frame, codecformat="j2k", reversible=True, level=0)
    ),
    JPEGLosslessSV1: encode_jpeg_lossless,
    JPEGBaseline8Bit: encode_jpeg_baseline,
}

# In turn, one a series, so that every archive holds every syntax.
GREY_SYNTAXES: Final = (
    ExplicitVRLittleEndian,
    JPEGLSLossless,
    JPEG2000Lossless,
    ImplicitVRLittleEndian,
    RLELossless,
    JPEGLosslessSV1,
)
COLOUR_SYNTAXES: Final = (JPEGBaseline8Bit, ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless)


def set_pixels(dataset: Dataset, frames: Frame, syntax: str, *, bits: int, planar: bool = False) -> None:
    """Put `frames` into `dataset` in transfer syntax `syntax`, with the Image Pixel module (PS3.3 C.7.6.3).

    Args:
        frames: (n, rows, columns) or (n, rows, columns, 3), one byte or two a sample.
        bits: BitsStored.
        planar: colour by plane; only in native syntaxes.
    """
    colour = frames.ndim == 4
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.Rows, dataset.Columns = frames.shape[1:3]
    dataset.BitsAllocated = frames.dtype.itemsize * 8
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(frames.dtype.kind == "i")
    if colour:
        dataset.PhotometricInterpretation = "YBR_FULL_422" if syntax == JPEGBaseline8Bit else "RGB"
        dataset.PlanarConfiguration = int(planar)
    if len(frames) > 1:
        dataset.NumberOfFrames = len(frames)
    if syntax in ENCODERS:
        dataset.PixelData = encapsulate([ENCODERS[syntax](frame) for frame in frames])
        dataset["PixelData"].is_undefined_length = True
    else:
        raw = (frames.transpose(0, 3, 1, 2) if planar else frames).tobytes()
        dataset.PixelData = raw + b"\0" * (len(raw) % 2)
    dataset["PixelData"].VR = "OW" if frames.dtype.itemsize == 2 and syntax not in ENCODERS else "OB"
    if syntax == JPEGBaseline8Bit:
        dataset.LossyImageCompression = "01"
