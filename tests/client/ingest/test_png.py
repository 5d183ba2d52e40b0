"""PNG files of every colour type, and bytes that only look like one."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rin.client.ingest.png import FILE_BYTES, header_of, read_png
from rin.client.ingest.reasons import Refused
from tests.client.ingest.radimagenet_tree import chunk, png, scan

GREY = scan(3, 256, 256)
PALETTE = chunk(b"PLTE", bytes(255 - level for level in range(256) for _ in range(3)))


@pytest.mark.parametrize(
    ("data", "photometric", "bits"),
    [
        (png(GREY), "MONOCHROME2", 8),
        (png(GREY.astype(np.uint16) * 257, bits=16), "MONOCHROME2", 16),
        (png(np.dstack([GREY] * 3), colour=2), "RGB", 8),
        (png(np.dstack([GREY.astype(np.uint16) * 257] * 3), colour=2, bits=16), "RGB", 16),
        (png(255 - GREY, colour=3, extra=PALETTE), "PALETTE COLOR", 8),
        (png(np.dstack([GREY, np.full_like(GREY, 255)]), colour=4), "MONOCHROME2", 8),
        (png(np.dstack([GREY] * 3 + [np.full_like(GREY, 255)]), colour=6), "RGB", 8),
    ],
)
def test_the_same_grey_values_in_every_encoding(data: bytes, photometric: str, bits: int, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(data)
    layout, picture = read_png(path)
    assert (layout.rows, layout.cols, layout.photometric, layout.stored) == (256, 256, photometric, bits)
    assert (picture.frame, picture.policy, picture.reason) == (1, "full-range", None)
    np.testing.assert_array_equal(np.frombuffer(picture.pixels, np.uint8).reshape(256, 256), GREY)


def test_what_is_transparent_is_black(tmp_path: Path) -> None:
    path, half = tmp_path / "x.png", np.full_like(GREY, 255)
    half[:128] = 0
    path.write_bytes(png(np.dstack([GREY, half]), colour=4))
    picture = np.frombuffer(read_png(path)[1].pixels, np.uint8).reshape(256, 256)
    assert not picture[:128].any()
    np.testing.assert_array_equal(picture[128:], GREY[128:])


@pytest.mark.parametrize(
    ("size", "reason"),
    [((0, 5), "bad-header"), ((1 << 31, 1), "too-large"), ((8193, 8193), "too-large"), ((8192, 8192), "")],
)
def test_the_header_is_bounded_before_anything_is_decompressed(size: tuple[int, int], reason: str) -> None:
    head = png(GREY, size=size)[:33]
    if reason:
        with pytest.raises(Refused, match=reason):
            header_of(head)
    else:
        assert (header_of(head).cols, header_of(head).rows) == size


def test_a_file_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with path.open("wb") as file:
        file.write(png(GREY))
        file.truncate(FILE_BYTES + 1)  # sparse: it takes no disk
    with pytest.raises(Refused, match="too-large"):
        read_png(path)


def test_a_chunk_may_not_promise_more_than_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png(GREY)[:33] + struct.pack(">I", 0xFFFFFFFF) + b"IDAT" + bytes(100))
    with pytest.raises(Refused, match="truncated"):
        read_png(path)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 900), bytes_=st.binary(max_size=12), cut=st.integers(0, 400))
def test_damage_is_a_reason_and_nothing_else(at: int, bytes_: bytes, cut: int) -> None:
    data = bytearray(png(scan(4, 24, 24)))
    data[at : at + len(bytes_)] = bytes_
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.png"
        path.write_bytes(data[: max(0, len(data) - cut)])
        try:
            _, picture = read_png(path)
        except Refused:
            return
    assert len(picture.pixels) == 256 * 256
