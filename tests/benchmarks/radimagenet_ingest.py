"""Ingest of RadImageNet's layout against a bare loop: `python -m tests.benchmarks.radimagenet_ingest [IMAGES]`.

Images a CPU-second, children included, over the same generated PNGs of 224 x 224; the loop is `cv2.imread` and
`cv2.resize` to 256 x 256: once keeping nothing, once appending the pictures to a file.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from pathlib import Path

import cv2

from rin.client.home import Home
from rin.client.ingest.pipeline import ingest
from tests.client.ingest.radimagenet_tree import CLASSES, write_tree


def cpu() -> float:
    """CPU-seconds of this process and of its ended children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def bare(root: Path, keep: Path | None = None) -> float:
    """CPU-seconds of the loop that a user would write; with `keep` the pictures go into that file."""
    start = cpu()
    kept = keep.open("wb") if keep else None
    for path in sorted(root.rglob("*.png")):
        image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        assert image is not None
        picture = cv2.resize(image, (256, 256))
        if kept is not None:
            kept.write(picture.tobytes())
    if kept is not None:
        os.fsync(kept.fileno())
        kept.close()
    return cpu() - start


def main() -> None:
    cv2.setNumThreads(1)
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 2800
    with tempfile.TemporaryDirectory() as folder:
        tree = write_tree(Path(folder), images=images // len(CLASSES))
        lists, home = tree.write_lists(), Home(Path(folder) / "home")
        bare(tree.root)  # the files are in memory now, for both
        for name, done in (
            ("bare loop", lambda: bare(tree.root)),
            ("bare loop that keeps them", lambda: bare(tree.root, Path(folder) / "kept")),
            ("ingest", lambda: _ingest(home, tree.root, lists)),
            ("ingest again, nothing new", lambda: _ingest(home, tree.root, lists)),
        ):
            seconds = done()
            print(f"{name:<28}{len(tree.labels) / seconds:8.0f} images/CPU-s{seconds:8.2f} CPU-s")


def _ingest(home: Home, root: Path, lists: list[Path]) -> float:
    start = cpu()
    report = ingest(home, site="siteA", roots=[root], layout="radimagenet", csv=lists, workers=1)
    assert report.refused == {}
    return cpu() - start


if __name__ == "__main__":
    main()
