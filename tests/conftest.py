"""Child processes of the tests import this checkout, whatever rin is installed elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "typings"), os.environ.get("PYTHONPATH")]))
# One thread a process: two thread counts give two different sums, and the machine has other tests to run.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The public DICOM and image files beside the checkout; a user's clone does not have them."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the real images are not beside this checkout (../shared/data)")
    return path
