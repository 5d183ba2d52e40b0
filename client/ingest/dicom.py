"""One DICOM file to pictures: the fast path over the skimmed header, pydicom for everything unusual."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut

from rin.client.ingest.header import (
    DEFLATED,
    EXPLICIT_BE,
    EXPLICIT_LE,
    FRAME_GROUPS,
    IMPLICIT_LE,
    MEANING,
    NATIVE,
    PIXEL_DATA,
    SHARED_GROUPS,
    TAGS,
    UID,
    UNDEFINED,
    Header,
    parse_number,
)
from rin.client.ingest.pixels import GREY, PALETTE, Layout, compressed, layout_of, luma_of, native
from rin.client.ingest.reasons import Refused
from rin.client.ingest.skim import HEAD
from rin.client.ingest.windowing import Grey, Lut, aspect_of, grey_of, render, render_colour, rescale, window_of

INFLATED: Final = 1 << 29  # bytes of a deflated data set: 512 MiB
# What pydicom raises on damaged bytes; it documents none of it.
DAMAGED: Final = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    NotImplementedError,
    OverflowError,
    EOFError,
    RuntimeError,
    InvalidDicomError,
    zlib.error,
)


@dataclass(frozen=True, slots=True)
class Picture:
    """One frame: (256, 256) uint8 pixels as bytes, or the reason why there is none. Frames count from 1."""

    frame: int
    pixels: bytes
    policy: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class _Source:
    """An opened object: its layout, and each frame's bytes, samples and grey values."""

    layout: Layout
    samples: Callable[[int], NDArray[Any]]
    grey: Callable[[int], Grey]


def read_header(path: Path) -> Header:
    """The header of any DICOM file through pydicom.

    Raises:
        Refused: `not-dicom`, `bad-header`, `unreadable`, `too-large`.
    """
    return _header(_dataset(path, pixels=False))


def pictures(
    path: Path, *, modality: str, frames: frozenset[int] | None = None, header: Header | None = None
) -> Iterator[Picture]:
    """Decode, window and shrink the wanted frames (from 1; None means all) of one file, in order.

    Args:
        header: the skimmed header, if the caller has it; pydicom reads the file where it is None or not simple.

    Raises:
        Refused: no frame can be read; refusals of single frames are yielded.
    """
    source = _open(path, modality, header)
    for index in range(source.layout.frames):
        if frames is None or index + 1 in frames:
            yield _picture(source, index)


def _picture(source: _Source, index: int) -> Picture:
    try:
        samples, grey = source.samples(index), source.grey(index)
        coloured = source.layout.photometric not in GREY
        image, policy = render_colour(samples, grey.aspect) if coloured else render(samples, grey)
    except Refused as refused:
        return Picture(index + 1, b"", "", refused.reason)
    return Picture(index + 1, image.tobytes(), policy)


def _open(path: Path, modality: str, header: Header | None) -> _Source:
    simple = header is not None and header.complete and not header.from_dataset
    simple = simple and header is not None and not header.meaning and header.syntax != EXPLICIT_BE
    if header is None or not simple or header.text("PhotometricInterpretation") == PALETTE:
        return _open_dataset(path, modality)
    if header.pixel_offset is None:
        raise Refused("no-pixels")
    return _open_simple(path, header, modality)


def _open_simple(path: Path, header: Header, modality: str) -> _Source:
    """No data set is built: the frames lie at known offsets."""
    layout = layout_of(header)
    grey = grey_of(header, modality=modality, signed=layout.signed)
    offset = header.pixel_offset or 0
    if header.pixel_length == UNDEFINED:
        with path.open("rb") as file:
            file.seek(offset)
            return _Source(layout, _encapsulated(file.read(), layout), lambda _: grey)

    def samples(index: int) -> NDArray[Any]:
        if (index + 1) * layout.frame_bytes > header.pixel_length:
            raise Refused("truncated")  # what follows is another element, not pixels
        with path.open("rb", buffering=0) as file:
            file.seek(offset + index * layout.frame_bytes)
            return native(file.read(layout.frame_bytes), layout)

    return _Source(layout, samples, lambda _: grey)


def _encapsulated(data: bytes, layout: Layout) -> Callable[[int], NDArray[Any]]:
    """Frames from fragments (PS3.5 A.4), with or without an offset table; read in order, so kept one at a time."""
    stream = generate_frames(data, number_of_frames=layout.frames)
    at, frame = -1, b""

    def samples(index: int) -> NDArray[Any]:
        nonlocal at, frame
        try:
            while at < index:
                frame = next(stream)
                at += 1
        except (StopIteration, *DAMAGED):
            raise Refused("truncated") from None
        return compressed(frame, layout)

    return samples


def _open_dataset(path: Path, modality: str) -> _Source:
    """Functional groups, look-up tables, palettes, big endian, deflated, long or odd headers."""
    dataset = _dataset(path, pixels=True)
    header = _header(dataset)
    layout = layout_of(header)
    top = grey_of(header, modality=modality, signed=layout.signed)
    try:
        if PIXEL_DATA not in dataset:
            raise Refused("no-pixels")
        raw = dataset.get_item(PIXEL_DATA)
        value = raw.value if raw is not None and isinstance(raw.value, bytes) else b""
        samples = _samples_of(dataset, value, layout, encapsulated=_is_encapsulated(value, header.syntax))
        greys = _greys(dataset, top, layout)
    except DAMAGED:
        raise Refused("bad-header") from None
    return _Source(layout, samples, greys)


def _is_encapsulated(value: bytes, syntax: str) -> bool:
    """Fragments begin with an item tag; a wrong or missing transfer syntax is not asked."""
    return value[:4] == b"\xfe\xff\x00\xe0" or syntax not in NATIVE


def _samples_of(dataset: Dataset, value: bytes, layout: Layout, *, encapsulated: bool) -> Callable[[int], NDArray[Any]]:
    if layout.photometric == PALETTE:
        indices = (
            _encapsulated(value, layout) if encapsulated else lambda index: native(_cut(value, index, layout), layout)
        )
        return lambda index: _palette(indices(index), dataset)
    if encapsulated:
        return _encapsulated(value, layout)
    if layout.syntax == EXPLICIT_BE and (layout.allocated == 8 or layout.samples == 3):
        # 8-bit samples may be stored as swapped words there (PS3.5 8.1.2): pydicom knows.
        return lambda index: _by_pydicom(dataset, index, layout)
    return lambda index: native(_cut(value, index, layout), layout)


def _cut(value: bytes, index: int, layout: Layout) -> memoryview:
    return memoryview(value)[index * layout.frame_bytes : (index + 1) * layout.frame_bytes]


def _by_pydicom(dataset: Dataset, index: int, layout: Layout) -> NDArray[Any]:
    try:
        image, _ = get_decoder(layout.syntax).as_array(dataset, index=index)
    except DAMAGED:
        raise Refused("truncated") from None
    return image if layout.samples == 1 else luma_of(image)


def _palette(indices: NDArray[Any], dataset: Dataset) -> NDArray[np.uint8]:
    """PS3.3 C.7.6.3.1.5: indices to RGB to luma, 16-bit tables to 8 bits."""
    try:
        rgb = apply_color_lut(indices, dataset)
    except DAMAGED:
        raise Refused("bad-header") from None
    return luma_of(rgb if rgb.dtype == np.uint8 else (rgb >> 8).astype(np.uint8))


def _greys(dataset: Dataset, top: Grey, layout: Layout) -> Callable[[int], Grey]:
    """Each frame's grey values: top level, then the shared, then the frame's own functional groups."""
    top = replace(
        top, modality_lut=_lut(dataset, "ModalityLUTSequence", layout), voi_lut=_lut(dataset, "VOILUTSequence", layout)
    )
    shared = dataset[SHARED_GROUPS].value if SHARED_GROUPS in dataset else []
    frames = dataset[FRAME_GROUPS].value if FRAME_GROUPS in dataset else []
    if shared:
        top = _with_groups(top, shared[0], layout)

    def grey(index: int) -> Grey:
        try:
            return _with_groups(top, frames[index], layout) if index < len(frames) else top
        except DAMAGED:
            raise Refused("bad-header") from None

    return grey


def _with_groups(grey: Grey, groups: Dataset, layout: Layout) -> Grey:
    """What one item of functional groups says (PS3.3 C.7.6.16.2.1, .9, .10, .11)."""
    changes: dict[str, Any] = {}
    if item := _first(groups, "PixelValueTransformationSequence"):
        changes["slope"] = rescale(_number(item, "RescaleSlope"), 1.0)
        changes["intercept"] = rescale(_number(item, "RescaleIntercept"), 0.0)
    if item := _first(groups, "FrameVOILUTSequence"):
        changes["window"] = window_of(
            _numbers(item, "WindowCenter"), _numbers(item, "WindowWidth"), str(item.get("VOILUTFunction", "")).upper()
        )
    if item := _first(groups, "PixelMeasuresSequence"):
        changes["aspect"] = aspect_of(_numbers(item, "PixelSpacing")) or grey.aspect
    return replace(grey, **changes)


def _first(dataset: Dataset, keyword: str) -> Dataset | None:
    items = dataset.get(keyword)
    return items[0] if items else None


def _numbers(dataset: Dataset, keyword: str) -> list[float]:
    """Decimal strings without pydicom's validation, which raises on access."""
    value = dataset.get(keyword)
    values = [] if value is None else value if isinstance(value, (list, MultiValue)) else [value]
    return [parse_number(str(part)) for part in values]


def _number(dataset: Dataset, keyword: str) -> float | None:
    values = _numbers(dataset, keyword)
    return values[0] if values else None


def _lut(dataset: Dataset, keyword: str, layout: Layout) -> Lut | None:
    """The first table of a LUT sequence (PS3.3 C.11.1.1.1)."""
    item = _first(dataset, keyword)
    if item is None:
        return None
    count, first, _ = (int(part) for part in item.LUTDescriptor)
    if layout.signed and first > 32767:
        first -= 65536
    data = item.LUTData
    if isinstance(data, bytes):
        wide = len(data) >= 2 * (count or 65536)
        data = np.frombuffer(data, "<u2" if wide else "u1")
    table = np.asarray(data, np.float32).ravel()[: count or 65536]
    if table.size == 0 or not math.isfinite(float(table[0])):
        raise Refused("bad-header")
    return Lut(first, table)


def _dataset(path: Path, *, pixels: bool) -> Dataset:
    """Read with pydicom; without a preamble only what says that it is DICOM."""
    try:
        _bound_inflation(path)
        dataset = pydicom.dcmread(path, force=True, stop_before_pixels=not pixels)
    except OSError:
        raise Refused("unreadable") from None
    except DAMAGED:
        raise Refused("bad-header") from None
    return dataset


def _bound_inflation(path: Path) -> None:
    """A deflated data set may hide terabytes (PS3.5 A.5): count its bytes in pieces before pydicom inflates it."""
    with path.open("rb") as file:
        head = file.read(HEAD)
        if DEFLATED.encode() not in head[:2048]:
            return
        file.seek(0)
        data = file.read()
    start = head.find(DEFLATED.encode()) + len(DEFLATED)
    length = int.from_bytes(data[140:144], "little")
    inflate, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    rest = data[144 + length :] if head[128:132] == b"DICM" else data[start:]
    while rest:
        total += len(inflate.decompress(rest, 1 << 22))
        if total > INFLATED:
            raise Refused("too-large")
        rest = inflate.unconsumed_tail


def _header(dataset: Dataset) -> Header:
    """pydicom's raw elements as a `Header`: bytes, before any conversion that may raise."""
    elements = {}
    for tag in TAGS.values():
        if tag in dataset:
            item = dataset.get_item(tag)
            value = None if item is None else item.value
            elements[tag] = value if isinstance(value, bytes) else b"" if value is None else str(value).encode()
    meaning = frozenset(tag for tag in MEANING if tag in dataset)
    header = Header(elements, _syntax(dataset), meaning, from_dataset=True)
    if not UID.fullmatch(header.text("SOPClassUID")):
        raise Refused("bad-header" if getattr(dataset, "preamble", None) else "not-dicom")
    return header


def _syntax(dataset: Dataset) -> str:
    """The named transfer syntax, else the one that pydicom saw in the encoding."""
    named = str(getattr(dataset, "file_meta", {}).get("TransferSyntaxUID", "") or "")
    if named:
        return EXPLICIT_LE if named == DEFLATED else named
    implicit, little = dataset.original_encoding
    if not little and little is not None:
        return EXPLICIT_BE
    return IMPLICIT_LE if implicit else EXPLICIT_LE
