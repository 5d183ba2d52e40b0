"""What a codestream says of itself before it is decoded."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rin.client.ingest.codestream import Kind, inspect, sniff
from rin.client.ingest.reasons import Refused

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8)
STREAMS: dict[str, tuple[bytes | bytearray, Kind]] = {
    "baseline": (imagecodecs.jpeg8_encode(GREY), "jpeg"),
    "lossless": (imagecodecs.ljpeg_encode(GREY.astype(np.uint16)), "jpeg"),
    "ls": (imagecodecs.jpegls_encode(GREY), "jpegls"),
    "2000": (imagecodecs.jpeg2k_encode(GREY, codecformat="J2K"), "jpeg2k"),
    "2000 in a box": (imagecodecs.jpeg2k_encode(GREY, codecformat="JP2"), "jpeg2k"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_family_and_size(name: str) -> None:
    frame, kind = STREAMS[name]
    assert sniff(frame) == kind
    stream = inspect(frame, kind)
    assert (stream.rows, stream.cols, stream.samples) == (6, 8, 1)


@pytest.mark.parametrize("name", STREAMS)
def test_a_cut_stream_is_truncated_and_not_filled_with_grey(name: str) -> None:
    frame, kind = STREAMS[name]
    with pytest.raises(Refused, match="truncated"):
        inspect(frame[: len(frame) // 2], kind)


def test_colours_are_told_by_markers_and_ids() -> None:
    rgb = np.zeros((8, 8, 3), np.uint8)
    assert inspect(imagecodecs.jpeg8_encode(rgb, colorspace="RGB", outcolorspace="YCBCR"), "jpeg").ybr is True
    assert inspect(imagecodecs.jpeg8_encode(rgb, colorspace="RGB", outcolorspace="RGB"), "jpeg").ybr is False


def test_a_claim_of_terabytes_is_only_read() -> None:
    frame = bytearray(STREAMS["2000"][0])
    at = frame.index(b"\xff\x4f\xff\x51") + 8
    frame[at : at + 8] = b"\x00\x1f\xff\xff" * 2
    assert inspect(bytes(frame), "jpeg2k").rows == 0x1FFFFF


@given(st.sampled_from(sorted(STREAMS)), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=8))
def test_damaged_headers_give_a_reason(name: str, changes: list[tuple[int, int]]) -> None:
    frame, kind = bytearray(STREAMS[name][0]), STREAMS[name][1]
    for at, value in changes:
        frame[at % len(frame)] = value
    sniff(bytes(frame))
    try:
        inspect(bytes(frame), kind)
    except Refused as refused:
        assert refused.reason in ("codec-error", "truncated")
