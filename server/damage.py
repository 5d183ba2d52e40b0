"""Damaged files, as archives have them: each kind is a function from a good file's bytes to a bad one's."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

import numpy as np

_META_SYNTAX: Final = b"\x02\x00\x10\x00UI"  # (0002,0010) TransferSyntaxUID, explicit VR
_PIXELS: Final = b"\xe0\x7f\x10\x00"  # (7FE0,0010) PixelData
_ROWS: Final = b"\x28\x00\x10\x00"  # (0028,0010) Rows

Rng = np.random.Generator


def _truncated(data: bytes, rng: Rng) -> bytes:
    start = data.rindex(_PIXELS)
    return data[: start + int((len(data) - start) * rng.uniform(0.3, 0.7))]


def _garbage(data: bytes, rng: Rng) -> bytes:
    return rng.bytes(int(rng.integers(2_000, 20_000)))


def _text(data: bytes, rng: Rng) -> bytes:
    return b"Dear colleague,\r\nthe images of CANARY^ZOE are attached.\r\n" * int(rng.integers(1, 40))


def _first_fragment(data: bytes) -> int:
    """Offset of the first fragment's bytes in encapsulated pixel data (PS3.5 A.4)."""
    table = data.index(b"\xfe\xff\x00\xe0", data.index(_PIXELS))
    return table + 16 + struct.unpack_from("<I", data, table + 4)[0]


def _corrupt(data: bytes, rng: Rng) -> bytes:
    start = _first_fragment(data)
    return data[:start] + rng.bytes(64) + data[start + 64 :]


def _no_syntax(data: bytes, rng: Rng) -> bytes:
    """Without TransferSyntaxUID, and with no codestream marker left from which a reader could tell it."""
    data = _corrupt(data, rng)
    start = data.index(_META_SYNTAX)
    end = start + 8 + struct.unpack_from("<H", data, start + 6)[0]
    length = struct.unpack_from("<I", data, 140)[0] - (end - start)  # FileMetaInformationGroupLength
    return data[:140] + struct.pack("<I", length) + data[144:start] + data[end:]


def _no_rows(data: bytes, rng: Rng) -> bytes:
    start = data.index(_ROWS) + 8  # tag, VR and length or a long length: 8 bytes either way
    return data[:start] + b"\0\0" + data[start + 2 :]


def _empty(data: bytes, rng: Rng) -> bytes:
    return b""


# Kind -> (damage, which files: "native" or "encapsulated" pixel data, or "any").
DAMAGE: Final[dict[str, tuple[Callable[[bytes, Rng], bytes], str]]] = {
    "truncated-pixels": (_truncated, "native"),
    "corrupt-codestream": (_corrupt, "encapsulated"),
    "garbage": (_garbage, "any"),
    "not-dicom-text": (_text, "any"),
    "no-transfer-syntax": (_no_syntax, "encapsulated"),
    "rows-zero": (_no_rows, "any"),
    "empty": (_empty, "any"),
}
