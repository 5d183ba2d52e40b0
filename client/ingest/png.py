"""One PNG file to a picture: bounded, complete, grey whatever its colour type; already windowed, so no window step."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from rin.client.ingest.dicom import Picture
from rin.client.ingest.pixels import FRAME_PIXELS, Layout
from rin.client.ingest.reasons import Refused
from rin.client.ingest.windowing import render_colour

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
FILE_BYTES: Final = 8 * FRAME_PIXELS + (1 << 20)  # the largest picture, four samples of 16 bits, not compressed at all
_HEAD: Final = 33  # signature and IHDR
# Colour type (PNG 11.2.1) to samples and the nearest word of DICOM for the catalog.
_COLOURS: Final[dict[int, tuple[int, str]]] = {
    0: (1, "MONOCHROME2"),
    2: (3, "RGB"),
    3: (1, "PALETTE COLOR"),
    4: (2, "MONOCHROME2"),
    6: (4, "RGB"),
}


def read_png(path: Path) -> tuple[Layout, Picture]:
    """Decode one file and fit it into the square.

    Raises:
        Refused: `empty`, `not-png`, `bad-header`, `too-large`, `truncated`, `codec-error`, `codec-mismatch` or
            `constant`.
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        head = file.read(_HEAD)
        layout = header_of(head)
        if os.fstat(file.fileno()).st_size > FILE_BYTES:
            raise Refused("too-large")
        data = head + file.read()
    check_chunks(data)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise Refused("codec-error")
    if image.shape[:2] != (layout.rows, layout.cols):
        raise Refused("codec-mismatch")
    picture, policy = render_colour(_grey(image), 1.0)
    return layout, Picture(1, picture.tobytes(), policy)


def header_of(head: bytes) -> Layout:
    """Size and format by the first 33 bytes, before anything is decompressed: a header may promise terabytes.

    Raises:
        Refused: `empty`, `not-png`, `truncated`, `bad-header` or `too-large`.
    """
    if not head:
        raise Refused("empty")
    if not head.startswith(SIGNATURE):
        raise Refused("not-png")
    if len(head) < _HEAD:
        raise Refused("truncated")
    cols, rows = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    bits, colour = head[24], head[25]
    if head[12:16] != b"IHDR" or not rows or not cols or colour not in _COLOURS:
        raise Refused("bad-header")
    if rows * cols > FRAME_PIXELS:
        raise Refused("too-large")
    samples, photometric = _COLOURS[colour]
    return Layout(rows, cols, 1, samples, photometric, False, max(bits, 8), bits, bits - 1, False, "png")


def check_chunks(data: bytes) -> None:
    """Every chunk is whole, up to the last one (PNG 5.3): a decoder may fill what is missing with black.

    Raises:
        Refused: `truncated` or `codec-error`.
    """
    view, at = memoryview(data), len(SIGNATURE)
    while True:
        end = at + 8 + int.from_bytes(view[at : at + 4], "big")
        if end + 4 > len(view):
            raise Refused("truncated")
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise Refused("codec-error")
        if view[at + 4 : at + 8] == b"IEND":
            return
        at = end + 4


def _grey(image: NDArray[Any]) -> NDArray[np.uint8]:
    """The full range of the samples becomes 0..255; colour becomes luma, and what is transparent is black."""
    eight = image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)
    if eight.ndim == 2:
        return eight
    luma = cv2.cvtColor(eight[..., :3], cv2.COLOR_BGR2GRAY).astype(np.uint8, copy=False)
    if eight.shape[2] == 3:
        return luma
    return np.rint(luma * (eight[..., 3] / np.float32(255))).astype(np.uint8)
