"""The chain's own words: heads as one line of text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rin.common.chain import Head
from rin.common.errors import ConfigError


@given(st.integers(0, 10**9 - 1), st.binary(min_size=32, max_size=32))
def test_a_head_is_one_line_of_text(count: int, digest: bytes) -> None:
    head = Head(count=count, digest=digest.hex())
    assert Head.parse(f" {head}\n") == head


@pytest.mark.parametrize("text", ["", "3", "3:ff", "-1:" + "0" * 64, "3:" + "G" * 64, f"{'9' * 10}:{'0' * 64}"])
def test_what_is_no_head(text: str) -> None:
    with pytest.raises(ConfigError):
        Head.parse(text)
