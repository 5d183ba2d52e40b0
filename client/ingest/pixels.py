"""Bytes of one frame to stored values: transfer syntax, sign, unused bits, colour (PS3.5 8, PS3.3 C.7.6.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from rin.client.ingest.codestream import Codestream, Kind, inspect, sniff
from rin.client.ingest.header import EXPLICIT_BE, NATIVE, Header
from rin.client.ingest.reasons import Refused

FRAME_PIXELS: Final = 1 << 26  # 67 M pixels a frame: twice the largest mammogram
FRAMES: Final = 4096  # frames read of one object
GREY: Final = frozenset({"MONOCHROME1", "MONOCHROME2"})
COLOUR: Final = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"})
PALETTE: Final = "PALETTE COLOR"
LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)  # PS3.3 C.7.6.3.1.2: Y of YBR_FULL


@dataclass(frozen=True, slots=True)
class Layout:
    """The image pixel module of one object (PS3.3 C.7.6.3)."""

    rows: int
    cols: int
    frames: int
    samples: int
    photometric: str
    planar: bool
    allocated: int
    stored: int
    high: int
    signed: bool
    syntax: str

    @property
    def frame_bytes(self) -> int:
        """Bytes of one uncompressed frame; YBR_FULL_422 shares its chroma between two pixels."""
        samples = 2 if self.photometric == "YBR_FULL_422" else self.samples
        return self.rows * self.cols * samples * self.allocated // 8


def layout_of(header: Header) -> Layout:
    """Read and check the layout.

    Raises:
        Refused: `bad-header`, `too-large` or `unsupported-pixels`.
    """
    rows, cols = header.word("Rows"), header.word("Columns")
    allocated = header.word("BitsAllocated")
    stored = header.word("BitsStored", allocated)
    if not rows or not cols or not allocated or not stored or stored > allocated:
        raise Refused("bad-header")
    count = header.number("NumberOfFrames")
    if count is not None and not (count == count and count >= 0 and count == int(count)):
        raise Refused("bad-header")
    photometric = header.text("PhotometricInterpretation")
    samples = header.word("SamplesPerPixel", 3 if photometric in COLOUR else 1)
    widths = (8, 16) if photometric in COLOUR else (8, 16, 32)
    if allocated not in widths or photometric not in GREY | COLOUR | {PALETTE}:
        raise Refused("unsupported-pixels")
    if samples is None or samples != (3 if photometric in COLOUR else 1):
        raise Refused("bad-header")
    high = header.word("HighBit", stored - 1)
    high = stored - 1 if high is None or not stored - 1 <= high < allocated else high
    frames = int(count or 1)  # absent, empty or 0: one frame
    if rows * cols > FRAME_PIXELS or frames > FRAMES:
        raise Refused("too-large")
    planar, signed = header.word("PlanarConfiguration", 0) == 1, header.word("PixelRepresentation", 0) == 1
    return Layout(rows, cols, frames, samples, photometric, planar, allocated, stored, high, signed, header.syntax)


def native(data: bytes | memoryview, layout: Layout) -> NDArray[Any]:
    """One uncompressed little-endian frame: (rows, cols) stored values, or (rows, cols) uint8 grey for colour.

    Raises:
        Refused: `truncated`.
    """
    if len(data) < layout.frame_bytes:
        raise Refused("truncated")
    order = ">" if layout.syntax == EXPLICIT_BE else "<"
    dtype = np.dtype(f"{order}u{layout.allocated // 8}")
    flat = np.frombuffer(data, dtype, count=layout.frame_bytes // dtype.itemsize)
    if layout.syntax == EXPLICIT_BE:
        flat = flat.astype(dtype.newbyteorder("="))
    if layout.samples == 1:
        return stored_values(flat.reshape(layout.rows, layout.cols), layout, shift=layout.high + 1 - layout.stored)
    if layout.photometric == "YBR_FULL_422":  # Y Y Cb Cr (PS3.3 C.7.6.3.1.2): the luma is every pixel's own
        luma = np.ascontiguousarray(flat.reshape(-1, 4)[:, :2]).reshape(layout.rows, layout.cols)
        return to_grey8(luma, layout)
    shape = (3, layout.rows, layout.cols) if layout.planar else (layout.rows, layout.cols, 3)
    image = flat.reshape(shape)
    image = np.moveaxis(image, 0, -1) if layout.planar else image
    return to_grey8(image[..., 0] if layout.photometric.startswith("YBR_FULL") else luma_of(image), layout)


def compressed(frame: bytes | bytearray, layout: Layout) -> NDArray[Any]:
    """One compressed frame, decoded: as `native` returns it.

    Raises:
        Refused: `unsupported-syntax`, `codec-error`, `codec-mismatch` or `truncated`.
    """
    kind = sniff(frame)  # the bytes win over a wrong transfer syntax
    if kind is None and layout.syntax == RLE:
        kind = "rle"
    if kind is None:
        raise Refused("codec-error" if layout.syntax in DECODERS else "unsupported-syntax")
    if kind == "rle":
        return _rle(frame, layout)
    stream = inspect(frame, kind)
    if (stream.rows, stream.cols) != (layout.rows, layout.cols) or stream.samples not in (1, layout.samples):
        raise Refused("codec-mismatch")
    try:
        image = _CODECS[kind](frame, stream, layout)
    except (RuntimeError, ValueError) as error:
        raise Refused("codec-error") from error
    if image.shape[:2] != (layout.rows, layout.cols):
        raise Refused("codec-mismatch")
    return image


def stored_values(image: NDArray[Any], layout: Layout, *, shift: int = 0) -> NDArray[Any]:
    """Keep BitsStored bits of unsigned samples and give them the sign of PixelRepresentation (PS3.5 8.1.1).

    Args:
        image: samples as the file or the codec gave them.
        shift: bits below the stored ones (HighBit + 1 - BitsStored).
    """
    width = max(layout.allocated, image.dtype.itemsize * 8)
    if layout.signed:
        values = image.astype(f"i{width // 8}", copy=False) if image.dtype.kind == "i" else _as_signed(image, width)
        up, down = width - layout.stored - shift, width - layout.stored
        return values if down == 0 else (values << up) >> down
    values = image.view(f"u{image.dtype.itemsize}") if image.dtype.kind == "i" else image
    values = values >> shift if shift else values
    return values if layout.stored >= image.dtype.itemsize * 8 else values & ((1 << layout.stored) - 1)


def _as_signed(image: NDArray[Any], width: int) -> NDArray[Any]:
    wide = image.astype(f"u{width // 8}", copy=False)
    return wide.view(f"i{width // 8}")


def luma_of(rgb: NDArray[Any]) -> NDArray[Any]:
    """RGB (rows, cols, 3) to luma (rows, cols) of the same unsigned type."""
    return np.rint(rgb.astype(np.float32) @ LUMA).astype(rgb.dtype)


def to_grey8(image: NDArray[Any], layout: Layout) -> NDArray[np.uint8]:
    """Colour needs no window: the full range of its stored bits becomes 0..255."""
    return image if image.dtype == np.uint8 else (image >> max(layout.stored - 8, 0)).astype(np.uint8)


def _jpeg(frame: bytes | bytearray, stream: Codestream, layout: Layout) -> NDArray[Any]:
    """Baseline, extended, progressive (8 and 12 bits) and lossless (to 16 bits)."""
    if stream.samples == 1:
        return _one_sample(imagecodecs.jpeg8_decode(frame), layout)
    ybr = layout.photometric != "RGB" if stream.ybr is None else stream.ybr
    if ybr:
        return to_grey8(imagecodecs.jpeg8_decode(frame, colorspace="YCBCR", outcolorspace="GRAYSCALE"), layout)
    return to_grey8(luma_of(imagecodecs.jpeg8_decode(frame, colorspace="RGB", outcolorspace="RGB")), layout)


def _jpegls(frame: bytes | bytearray, stream: Codestream, layout: Layout) -> NDArray[Any]:
    image = imagecodecs.jpegls_decode(frame)
    return _one_sample(image, layout) if stream.samples == 1 else _three_samples(image, layout)


def _jpeg2k(frame: bytes | bytearray, stream: Codestream, layout: Layout) -> NDArray[Any]:
    """The reversible and irreversible colour transforms are undone by the codec (PS3.5 8.2.4)."""
    image = imagecodecs.jpeg2k_decode(frame, numthreads=1)
    if stream.samples == 1:
        return _one_sample(image, layout)
    return to_grey8(luma_of(image), layout) if layout.photometric != "YBR_FULL" else to_grey8(image[..., 0], layout)


def _rle(frame: bytes | bytearray, layout: Layout) -> NDArray[Any]:
    """PackBits by byte plane, most significant first (PS3.5 G); the planes are counted before they are unpacked."""
    planes = layout.samples * layout.allocated // 8
    if len(frame) < 64 or int.from_bytes(frame[:4], "little") != planes:
        raise Refused("codec-mismatch" if len(frame) >= 64 else "truncated")
    size = layout.rows * layout.cols
    try:
        samples = np.frombuffer(imagecodecs.dicomrle_decode(frame, f"<u{layout.allocated // 8}"), np.uint8)
    except (RuntimeError, ValueError) as error:
        raise Refused("codec-error") from error
    flat = samples.view(f"<u{layout.allocated // 8}")
    if flat.size != layout.samples * size:
        raise Refused("truncated" if flat.size < layout.samples * size else "codec-mismatch")
    image = flat.reshape(layout.samples, layout.rows, layout.cols)
    return _one_sample(image[0], layout) if layout.samples == 1 else _three_samples(np.moveaxis(image, 0, -1), layout)


def _one_sample(image: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """A codec knows no PixelRepresentation: its samples are reinterpreted, or CT is wrong by exactly 65536."""
    if layout.samples == 3:  # a colour header over a grey codestream
        return to_grey8(image, layout)
    return stored_values(image, layout)


def _three_samples(image: NDArray[Any], layout: Layout) -> NDArray[np.uint8]:
    return to_grey8(image[..., 0] if layout.photometric.startswith("YBR_FULL") else luma_of(image), layout)


_CODECS: Final[dict[Kind, Callable[[bytes | bytearray, Codestream, Layout], NDArray[Any]]]] = {
    "jpeg": _jpeg,
    "jpegls": _jpegls,
    "jpeg2k": _jpeg2k,
}

RLE: Final = "1.2.840.10008.1.2.5"
# Transfer syntax UID (PS3.6 table A-1) to the family of codec; the frame's own first bytes decide in the end.
DECODERS: Final[dict[str, Kind]] = {
    "1.2.840.10008.1.2.4.50": "jpeg",  # baseline, 8 bits
    "1.2.840.10008.1.2.4.51": "jpeg",  # extended, 12 bits: no pydicom plug-in decodes it
    "1.2.840.10008.1.2.4.53": "jpeg",  # spectral selection, retired
    "1.2.840.10008.1.2.4.55": "jpeg",  # progressive, retired
    "1.2.840.10008.1.2.4.57": "jpeg",  # lossless
    "1.2.840.10008.1.2.4.70": "jpeg",  # lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": "jpegls",  # lossless
    "1.2.840.10008.1.2.4.81": "jpegls",  # near-lossless
    "1.2.840.10008.1.2.4.90": "jpeg2k",  # lossless
    "1.2.840.10008.1.2.4.91": "jpeg2k",
    "1.2.840.10008.1.2.4.201": "jpeg2k",  # high throughput, lossless: the same container
    "1.2.840.10008.1.2.4.202": "jpeg2k",
    "1.2.840.10008.1.2.4.203": "jpeg2k",
    RLE: "rle",
}


def readable(syntax: str) -> bool:
    """Whether rin has a decoder for the transfer syntax."""
    return syntax in NATIVE or syntax in DECODERS
