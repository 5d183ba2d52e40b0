"""The worker of tests/client/test_parallel.py: in float32, where slices and whole agree; with many snapshots."""

from __future__ import annotations

from rin.client import parallel
from rin.common import fit, snapshots

if __name__ == "__main__":
    fit.half_precision = lambda device: False
    snapshots.EVERY = 0.0
    parallel.main()
