"""State dicts of torch.save: every flipped byte is taken or refused, and never more than that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rin.common.errors import RefusedError
from rin.common.statedict import read_state


@pytest.mark.parametrize("zipped", [False, True])
def test_a_flipped_byte_does_no_more_than_be_refused(tmp_path: Path, zipped: bool) -> None:
    state = {"a": torch.ones(2), "b": torch.zeros(3)}
    torch.save(state, tmp_path / "w", _use_new_zipfile_serialization=zipped)
    whole, refused = (tmp_path / "w").read_bytes(), 0
    for place in range(0, len(whole), 1 if not zipped else 7):
        data = bytearray(whole)
        data[place] ^= 1
        (tmp_path / "w").write_bytes(data)
        try:
            read_state(tmp_path / "w")
        except RefusedError as error:
            assert error.code == "bad-weights"
            refused += 1
    assert refused > 50
