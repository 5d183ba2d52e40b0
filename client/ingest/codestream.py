"""What a compressed frame says about itself before anything decodes it: kind, size, precision, colour."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Literal

from rin.client.ingest.reasons import Refused

Kind = Literal["jpeg", "jpegls", "jpeg2k", "rle"]

_SOF_LS: Final = 0xF7
_SOF: Final = frozenset((0xC0, 0xC1, 0xC2, 0xC3))  # baseline, extended, progressive, lossless (ISO 10918-1 table B.1)
_OTHER_SOF: Final = frozenset((0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
_ALONE: Final = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length


@dataclass(frozen=True, slots=True)
class Codestream:
    """The frame header: `ybr` is None where the codestream does not say how its colours are coded."""

    kind: Kind
    rows: int
    cols: int
    samples: int
    precision: int
    ybr: bool | None = None


def sniff(frame: bytes | bytearray) -> Kind | None:
    """The family by its first bytes, whatever the transfer syntax says; None for something else."""
    if frame[:3] == b"\xff\xd8\xff":
        return "jpegls" if _sof(frame)[0] == _SOF_LS else "jpeg"
    if frame[:4] == b"\xff\x4f\xff\x51" or frame[4:8] == b"jP  ":
        return "jpeg2k"
    return None


def inspect(frame: bytes | bytearray, kind: Kind) -> Codestream:
    """Read the frame header of a JPEG, JPEG-LS or JPEG 2000 codestream.

    Raises:
        Refused: `codec-error` for a header that cannot be read, `truncated` for a stream without its end marker
            (decoders fill the missing part with grey and say nothing).
    """
    if b"\xff\xd9" not in frame[-16:]:
        raise Refused("truncated")
    return _inspect_j2k(frame) if kind == "jpeg2k" else _inspect_jpeg(frame, kind)


def _inspect_jpeg(frame: bytes | bytearray, kind: Kind) -> Codestream:
    marker, at, markers = _sof(frame)
    if marker == 0:
        raise Refused("codec-error")
    try:
        precision, rows, cols, samples = struct.unpack_from(">BHHB", frame, at + 2)
        ids = bytes(frame[at + 8 + 3 * i] for i in range(samples))
    except (struct.error, IndexError):
        raise Refused("codec-error") from None
    return Codestream(kind, rows, cols, samples, precision, _ybr(ids, markers) if kind == "jpeg" else None)


def _sof(frame: bytes | bytearray) -> tuple[int, int, dict[int, bytes]]:
    """Start-of-frame marker, offset of its segment (length first) and the APP segments before it; 0 if none."""
    at, markers = 2, {}
    while at + 4 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF or marker in _ALONE:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in _SOF or marker == _SOF_LS:
            return marker, at + 2, markers
        if marker in _OTHER_SOF or marker == 0xDA:
            break
        length = int.from_bytes(frame[at + 2 : at + 4], "big")
        if marker in (0xE0, 0xEE):
            markers[marker] = bytes(frame[at + 4 : at + 2 + length])
        at += 2 + length
    return 0, 0, markers


def _ybr(ids: bytes, markers: dict[int, bytes]) -> bool | None:
    """Whether three components are luma and chroma: Adobe's transform flag, then the ids, then JFIF."""
    adobe = markers.get(0xEE, b"")
    if adobe[:5] == b"Adobe" and len(adobe) >= 12:
        return adobe[11] != 0
    if ids in (b"RGB", b"rgb"):
        return False
    return True if markers.get(0xE0, b"")[:4] == b"JFIF" else None


def _inspect_j2k(frame: bytes | bytearray) -> Codestream:
    """SIZ marker segment (ISO 15444-1 A.5.1)."""
    at = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    try:
        x1, y1, x0, y0 = struct.unpack_from(">IIII", frame, at + 8)
        samples, depth = struct.unpack_from(">HB", frame, at + 40)
    except struct.error:
        raise Refused("codec-error") from None
    if at < 0 or x1 <= x0 or y1 <= y0:
        raise Refused("codec-error")
    return Codestream("jpeg2k", y1 - y0, x1 - x0, samples, (depth & 0x7F) + 1)
