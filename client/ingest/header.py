"""The header attributes that ingest reads, as raw bytes with typed, guarded access; everything else is left unread."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, field
from typing import Final, Literal

# The allow-list. Tag (group << 16 | element) of PS3.6 by keyword; no other attribute is ever kept.
TAGS: Final[dict[str, int]] = {
    "ImageType": 0x0008_0008,
    "SOPClassUID": 0x0008_0016,
    "SOPInstanceUID": 0x0008_0018,
    "Modality": 0x0008_0060,
    "SeriesDescription": 0x0008_103E,
    "PatientID": 0x0010_0020,
    "IssuerOfPatientID": 0x0010_0021,
    "BodyPartExamined": 0x0018_0015,
    "ImagerPixelSpacing": 0x0018_1164,
    "StudyInstanceUID": 0x0020_000D,
    "SeriesInstanceUID": 0x0020_000E,
    "InstanceNumber": 0x0020_0013,
    "SamplesPerPixel": 0x0028_0002,
    "PhotometricInterpretation": 0x0028_0004,
    "PlanarConfiguration": 0x0028_0006,
    "NumberOfFrames": 0x0028_0008,
    "Rows": 0x0028_0010,
    "Columns": 0x0028_0011,
    "PixelSpacing": 0x0028_0030,
    "PixelAspectRatio": 0x0028_0034,
    "BitsAllocated": 0x0028_0100,
    "BitsStored": 0x0028_0101,
    "HighBit": 0x0028_0102,
    "PixelRepresentation": 0x0028_0103,
    "PixelPaddingValue": 0x0028_0120,
    "PixelPaddingRangeLimit": 0x0028_0121,
    "BurnedInAnnotation": 0x0028_0301,
    "WindowCenter": 0x0028_1050,
    "WindowWidth": 0x0028_1051,
    "RescaleIntercept": 0x0028_1052,
    "RescaleSlope": 0x0028_1053,
    "VOILUTFunction": 0x0028_1056,
    "LossyImageCompression": 0x0028_2110,
}

# Sequences that change the meaning of pixels; a header that has one is read by pydicom.
MODALITY_LUT: Final = 0x0028_3000
VOI_LUT: Final = 0x0028_3010
SHARED_GROUPS: Final = 0x5200_9229
FRAME_GROUPS: Final = 0x5200_9230
MEANING: Final = frozenset({MODALITY_LUT, VOI_LUT, SHARED_GROUPS, FRAME_GROUPS})
PIXEL_DATA: Final = 0x7FE0_0010
UNDEFINED: Final = 0xFFFF_FFFF

IMPLICIT_LE: Final = "1.2.840.10008.1.2"
EXPLICIT_LE: Final = "1.2.840.10008.1.2.1"
EXPLICIT_BE: Final = "1.2.840.10008.1.2.2"
DEFLATED: Final = "1.2.840.10008.1.2.1.99"
NATIVE: Final = frozenset({IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE, DEFLATED})

UID: Final = re.compile(r"[0-9]+(\.[0-9]+)+")


@dataclass(frozen=True, slots=True)
class Header:
    """The allowed attributes of one file.

    Args:
        elements: tag to raw value bytes, as they stand in the file.
        syntax: transfer syntax UID, guessed from the encoding where the file names none.
        meaning: which of `MEANING` the data set holds.
        complete: the whole data set before the pixels was seen, so that what is absent here is absent.
        pixel_offset: byte offset of the pixel data's value in the file; None if not known or absent.
        pixel_length: its length in bytes, `UNDEFINED` when encapsulated (PS3.5 A.4).
        from_dataset: read by pydicom without its pixels, so that nothing is known about them.
    """

    elements: dict[int, bytes]
    syntax: str
    meaning: frozenset[int] = field(default_factory=frozenset)
    complete: bool = True
    pixel_offset: int | None = None
    pixel_length: int = 0
    from_dataset: bool = False

    def raw(self, keyword: str) -> bytes:
        """Value bytes without padding; empty if absent."""
        return self.elements.get(TAGS[keyword], b"").strip(b" \0")

    def texts(self, keyword: str) -> list[str]:
        """The values of a multi-valued text attribute (PS3.5 6.4), upper-case, stripped."""
        raw = self.raw(keyword)
        return [part.strip().upper() for part in raw.decode("latin-1").split("\\")] if raw else []

    def text(self, keyword: str) -> str:
        """The first value, or an empty string."""
        values = self.texts(keyword)
        return values[0] if values else ""

    def word(self, keyword: str, default: int | None = None) -> int | None:
        """A US value (PS3.5 6.2); None if it has another length than two bytes."""
        raw = self.elements.get(TAGS[keyword], b"")
        if not raw:
            return default
        return int.from_bytes(raw[:2], self._order()) if len(raw) == 2 else None

    def padding(self, keyword: str, *, signed: bool) -> int | None:
        """A US or SS value, whose type PixelRepresentation decides (PS3.3 C.7.5.1.1.2)."""
        raw = self.elements.get(TAGS[keyword], b"")
        return struct.unpack("<>"[self._order() == "big"] + ("h" if signed else "H"), raw)[0] if len(raw) == 2 else None

    def numbers(self, keyword: str) -> list[float]:
        """Decimal or integer strings; an unreadable or infinite one becomes NaN, so that its place is kept."""
        return [parse_number(part) for part in self.texts(keyword)]

    def number(self, keyword: str) -> float | None:
        """The first number; None if absent or blank, NaN if unreadable."""
        values = self.texts(keyword)
        return parse_number(values[0]) if values and values[0] else None

    def _order(self) -> Literal["little", "big"]:
        return "big" if self.syntax == EXPLICIT_BE else "little"


def parse_number(text: str) -> float:
    """A decimal string (PS3.5 6.2 DS), NaN where it is none (`1A`, `1,5`)."""
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
