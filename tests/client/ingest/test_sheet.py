"""The contact sheet shows what is in the cache, in the vault, for its owner."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from rin.client.home import Home
from rin.client.ingest.pipeline import ingest
from rin.client.ingest.sheet import contact_sheet
from rin.common.errors import StateError


def test_sheet(dicom_file: Callable[..., Path], home: Home, tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(StateError):
        contact_sheet(home)
    for _ in range(5):
        dicom_file(rng.integers(0, 200, (64, 32)).astype(np.uint8), WindowCenter="100", WindowWidth="200")
    ingest(home, site="A", roots=[tmp_path / "archive"], workers=1)
    path = contact_sheet(home, n=4)
    assert path.is_relative_to(home.root / "vault")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    sheet = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    assert sheet is not None
    assert sheet.shape == (2 * 320, 2 * 264)
    assert not sheet[4:260, 4:68].any()  # a tall image has black on both sides
    assert sheet[4:260, 68:196].mean() > 50
    assert contact_sheet(home, tmp_path / "three.png", n=1).exists()
