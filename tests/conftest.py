"""Child processes of the tests import this checkout, whatever rin is installed elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.small_run import SmallRun

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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRun]:
    """A run directory with joined sites, behind its gateway."""
    from tests.small_run import SmallRun  # imports rin, which the lines above have to precede

    run = SmallRun(tmp_path_factory.mktemp("small"))
    with run.gateway():
        yield run
