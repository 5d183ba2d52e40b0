"""A bounded header parser: what selection needs from the first 64 KiB of a file, or None for anything unusual."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

from rin.client.ingest.header import (
    DEFLATED,
    EXPLICIT_BE,
    EXPLICIT_LE,
    IMPLICIT_LE,
    MEANING,
    PIXEL_DATA,
    TAGS,
    UID,
    UNDEFINED,
    Header,
)
from rin.client.ingest.reasons import Refused

HEAD: Final = 65536  # bytes read of every file
_WANTED: Final = frozenset(TAGS.values())
_LONG: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_SHORT: Final = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_ITEM: Final = 0xFFFE_E000
_ITEM_END: Final = 0xFFFE_E00D
_SEQUENCE_END: Final = 0xFFFE_E0DD
_LAST_WANTED: Final = 0x0028_FFFF
_DEPTH: Final = 16  # nested sequences; deeper is hostile


class _Unusual(Exception):
    """Leave this file to pydicom."""


class _End(Exception):
    """The data set goes on after the head."""


@dataclass(slots=True)
class _Parse:
    """One encoding of a data set (PS3.5 7.1) over the head of a file."""

    head: bytes
    explicit: bool
    order: str
    short: struct.Struct = field(init=False)
    tag: struct.Struct = field(init=False)
    long: struct.Struct = field(init=False)

    def __post_init__(self) -> None:
        self.short = struct.Struct(self.order + "H")
        self.tag = struct.Struct(self.order + "HH")
        self.long = struct.Struct(self.order + "I")

    def element(self, at: int) -> tuple[int, bytes, int, int]:
        """Tag, VR, length and value offset of the element at `at`."""
        head = self.head
        if at + 12 > len(head) and at + 8 > len(head):
            raise _End
        group, number = self.tag.unpack_from(head, at)
        tag = group << 16 | number
        if not self.explicit or group == 0xFFFE:
            return tag, b"", self.long.unpack_from(head, at + 4)[0], at + 8
        vr = head[at + 4 : at + 6]
        if vr in _SHORT:
            return tag, vr, self.short.unpack_from(head, at + 6)[0], at + 8
        if vr not in _LONG:
            raise _Unusual
        if at + 12 > len(head):
            raise _End
        return tag, vr, self.long.unpack_from(head, at + 8)[0], at + 12

    def after_sequence(self, at: int, depth: int) -> int:
        """Offset after the delimiter of an undefined-length sequence whose first item is at `at` (PS3.5 7.5.2)."""
        while True:
            tag, _, length, at = self.element(at)
            if tag == _SEQUENCE_END:
                return at
            if tag != _ITEM or depth >= _DEPTH:
                raise _Unusual
            at = self._after_item(at, depth) if length == UNDEFINED else at + length

    def _after_item(self, at: int, depth: int) -> int:
        while True:
            tag, vr, length, at = self.element(at)
            if tag == _ITEM_END:
                return at
            if length == UNDEFINED:
                if vr == b"UN":  # implicit inside explicit (PS3.5 6.2.2)
                    raise _Unusual
                at = self.after_sequence(at, depth + 1)
            else:
                at += length


def skim(head: bytes, *, size: int) -> Header | None:
    """Parse the head of a file of `size` bytes.

    Args:
        head: the first `HEAD` bytes, or the whole file if it is shorter.

    Returns:
        The header, or None where only pydicom may know (deflated, odd VRs, long headers, deep nesting).

    Raises:
        Refused: `empty` or `not-dicom`.
    """
    if not head:
        raise Refused("empty")
    if head[128:132] == b"DICM":
        syntax, at = _meta(head, 132)
    elif _plausible_start(head):
        # PS3.10 7.1 wants the preamble; some archives cut it off. Only a data set that starts like one is taken.
        syntax, at = _meta(head, 0)
    else:
        raise Refused("not-dicom")
    syntax = syntax or _guess(head, at)
    if syntax == DEFLATED:
        return None
    parse = _Parse(head, explicit=syntax != IMPLICIT_LE, order=">" if syntax == EXPLICIT_BE else "<")
    try:
        header = _data_set(parse, at, syntax, size)
    except _Unusual:
        return None
    if header is not None and head[128:132] != b"DICM" and not UID.fullmatch(header.text("SOPClassUID")):
        raise Refused("not-dicom")
    return header


def _data_set(parse: _Parse, at: int, syntax: str, size: int) -> Header | None:
    """Walk the top level; None if the head ends before the attributes that selection needs."""
    elements: dict[int, bytes] = {}
    meaning: set[int] = set()
    last = 0
    head = parse.head
    while at < size:
        try:
            tag, vr, length, value = parse.element(at)
            if tag == PIXEL_DATA:
                return Header(elements, syntax, frozenset(meaning), True, value, length)
            if tag <= last or tag >> 16 == 0xFFFE:
                raise _Unusual
            if tag in MEANING:
                meaning.add(tag)
            if length == UNDEFINED:
                if vr == b"UN":
                    raise _Unusual
                at = parse.after_sequence(value, 0)
            else:
                at = value + length
                if tag in _WANTED:
                    if at > len(head):
                        raise _End
                    elements[tag] = head[value:at]
        except _End:
            if len(head) == size and last <= _LAST_WANTED:
                raise Refused("truncated") from None
            return Header(elements, syntax, frozenset(meaning), False) if last > _LAST_WANTED else None
        last = tag
    return Header(elements, syntax, frozenset(meaning), True)


def _meta(head: bytes, at: int) -> tuple[str, int]:
    """Transfer syntax (empty if not named) and the offset after the file meta group (PS3.10 7.1)."""
    parse = _Parse(head, explicit=True, order="<")
    syntax = ""
    while head[at : at + 2] == b"\x02\x00":
        try:
            tag, _, length, value = parse.element(at)
        except (_End, _Unusual):
            raise Refused("not-dicom") from None
        if tag == 0x0002_0010:
            syntax = head[value : value + length].strip(b" \0").decode("latin-1")
        at = value + length
    return syntax, at


def _guess(head: bytes, at: int) -> str:
    """The encoding by the shape of the first element, where the file names none."""
    if head[at : at + 1] == b"\0" and head[at + 1 : at + 2] != b"\0":
        return EXPLICIT_BE
    return EXPLICIT_LE if head[at + 4 : at + 6] in _SHORT | _LONG else IMPLICIT_LE


def _plausible_start(head: bytes) -> bool:
    """Whether bytes without preamble look like a data set: group 2 or 8 first, a small element, a sane length."""
    if len(head) < 16:
        return False
    group, number = struct.unpack_from("<HH", head, 0)
    if group not in (0x0002, 0x0008) or number > 0x0100:
        return False
    length = struct.unpack_from("<H" if head[4:6] in _SHORT else "<I", head, 6 if head[4:6] in _SHORT else 4)[0]
    return head[4:6] in _LONG or length <= 256
