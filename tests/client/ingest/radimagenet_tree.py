"""A small tree in RadImageNet's published layout, with every trap that the tests know; also a command for people:

python tests/client/ingest/radimagenet_tree.py FOLDER [IMAGES_PER_CLASS]
"""

from __future__ import annotations

import sqlite3
import struct
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from rin.client.home import Home
from rin.client.ingest.cache import map_shards
from rin.client.ingest.pipeline import IngestReport, ingest

# Class folders whose names are easy to get wrong, and plain ones; labels in the label set's names.
CLASSES = {
    "CT/abd/normal": "CT_abd_normal",
    "CT/abd/liver_lesion": "CT_abd_liver_lesion",
    "CT/lung/Nodule": "CT_lung_Nodule",
    "MR/af/Plantar_plate_tear": "MR_af_Plantar_plate_tear",
    "MR/af/achilles_pathology_": "MR_af_achilles_pathology_",
    "MR/af/intra-articular": "MR_af_intra",
    "MR/brain/extra": "MR_brain_extra",
    "MR/brain/pituatary_lesion": "MR_brain_pituatary_lesion",
    "MR/knee/intra": "MR_knee_intra",
    "MR/mriabd/liver_disease_": "MR_mriabd_liver_disease_",
    "MR/shoulder/ca++_tendinosis": "MR_shoulder_ca++_tendinosis",
    "MR/spine/foraminal_pathlogy": "MR_spine_foraminal_pathlogy",
    "US/gb": "US_usabd_gb",
    "US/thyroid_nodule": "US_usthyroid_thyroid_nodule",
}
SPLITS = ("train", "train", "train", "val", "test")  # of the files of a class, in turn


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    rows: np.ndarray, *, colour: int = 0, bits: int = 8, size: tuple[int, int] | None = None, extra: bytes = b""
) -> bytes:
    """A PNG of samples (rows, cols[, samples]) by hand: any colour type, any lie about its (cols, rows)."""
    cols_rows = size or (rows.shape[1], rows.shape[0])
    raw = b"".join(b"\0" + np.ascontiguousarray(row).astype(f">u{bits // 8}").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", *cols_rows, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def scan(seed: int, rows: int = 224, cols: int = 224) -> np.ndarray:
    """A bright ellipse with texture on black, as an axial slice is: (rows, cols) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : cols * 1j]
    body = (x / rng.uniform(0.6, 0.9)) ** 2 + (y / rng.uniform(0.5, 0.9)) ** 2 < 1
    tissue = cv2.GaussianBlur(rng.normal(110, 90, (rows, cols)), (0, 0), 4) * 2 - 90 + rng.normal(0, 6, (rows, cols))
    return np.where(body, np.clip(tissue, 1, 255), 0).astype(np.uint8)


@dataclass(slots=True)
class Tree:
    """`rows` are (file name as listed, label as listed, split); `labels` are what an honest file must end with."""

    parent: Path
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.parent / "radiology_ai"

    @property
    def lists(self) -> list[Path]:
        return [self.parent / f"RadiologyAI_{split}.csv" for split in ("train", "val", "test")]

    def put(self, name: str, data: bytes, *, split: str | None = "train", label: str | None = None) -> Path:
        """Write a file below the root and list it as published (`abd-normal`), unless `split` is None."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if split is not None:
            self.rows.append((f"radiology_ai/{name}", label or listed_name(name), split))
        return path

    def write_lists(self, *, end: str = "\n", mark: str = "") -> list[Path]:
        for path in self.lists:
            split = path.stem.rpartition("_")[2]
            lines = ["filename,label", *(f"{name},{label}" for name, label, where in self.rows if where == split)]
            path.write_bytes((mark + end.join(lines) + end).encode())
        return self.lists


def listed_name(name: str) -> str:
    """The label that the lists give a file: `<anatomy>-<class>`, for ultrasound with the anatomy that no folder has."""
    parts = name.split("/")
    if parts[0] == "US":
        return f"{'usthyroid' if parts[1].startswith('thyroid') else 'usabd'}-{parts[1]}"
    return f"{parts[1]}-{parts[2]}"


def write_tree(parent: Path, *, images: int = 2, side: int = 224) -> Tree:
    """Honest files only: `images` of each of `CLASSES`, grey PNGs of 8 bits, all different."""
    tree = Tree(parent)
    for number, (folder, label) in enumerate(CLASSES.items()):
        for image in range(images):
            name = f"{folder}/{folder.split('/')[1]}{image:06d}.png"
            data = cv2.imencode(".png", scan(number * 100_000 + image, side, side))[1].tobytes()
            tree.put(name, data, split=SPLITS[image % len(SPLITS)])
            tree.labels[name] = label
    return tree


def add_traps(tree: Tree) -> dict[str, str]:
    """Everything that the published data, or somebody else's copy of it, can hold; returns file to expected reason."""
    grey = scan(9_000_001)
    palette = chunk(b"PLTE", bytes(255 - level for level in range(256) for _ in range(3)))
    whole = png(scan(9_000_002))
    reasons: dict[str, str] = {}

    def bad(name: str, data: bytes, reason: str, split: str | None = "train", label: str | None = None) -> None:
        tree.put(name, data, split=split, label=label)
        reasons[name] = reason

    # one image under two classes, in two splits and in five encodings: the first file in the walk owns it
    tree.put("CT/abd/normal/a-first.png", png(grey), split="train")
    bad("CT/abd/normal/b-rgb.png", png(np.dstack([grey] * 3), colour=2), "duplicate-pixels")
    bad("CT/abd/normal/c-palette.png", png(255 - grey, colour=3, extra=palette), "duplicate-pixels")
    bad("CT/abd/normal/d-16-bit.png", png(grey.astype(np.uint16) * 257, bits=16), "duplicate-pixels")
    bad("CT/abd/normal/e-alpha.png", png(np.dstack([grey, np.full_like(grey, 255)]), colour=4), "duplicate-pixels")
    bad("CT/abd/urolithiasis/same-bytes.png", png(grey), "duplicate-pixels", split="test")
    # what no picture can be made of
    bad("CT/abd/normal/flat.png", png(np.full((224, 224), 3, np.uint8)), "constant")
    bad("US/thyroid/flat.png", png(np.zeros((224, 224), np.uint8)), "constant")
    bad("CT/abd/normal/transparent.png", png(np.dstack([grey, grey * 0]), colour=4), "constant")
    bad("CT/abd/normal/cut.png", whole[: len(whole) // 2], "truncated")
    bad("CT/abd/normal/cut-in-header.png", whole[:20], "truncated")
    bad("CT/abd/normal/flipped.png", whole[:5000] + bytes([whole[5000] ^ 255]) + whole[5001:], "codec-error")
    bad("CT/abd/normal/short.png", png(grey[:100], size=(224, 224)), "codec-error")
    bad("CT/abd/normal/bomb.png", png(grey, size=(200_000, 200_000)), "too-large")
    bad("CT/abd/normal/empty.png", b"", "empty")
    bad("CT/abd/normal/not.png", b"GIF89a, whatever its name says", "not-png")
    # names
    bad("CT/abd/tumour/x.png", png(scan(9_000_003)), "unmapped-label")
    bad("CT/abd/Normal/x.png", png(scan(9_000_004)), "unmapped-label")
    bad("MR/abd/normal/x.png", png(scan(9_000_005)), "unmapped-label")
    bad("US/normal-variant/x.png", png(scan(9_000_006)), "unmapped-label")
    bad("CT/abd/deep/er/x.png", png(scan(9_000_007)), "outside-layout", split=None)
    bad("CT/x.png", png(scan(9_000_008)), "outside-layout", split=None)
    bad("XR/chest/normal/x.png", png(scan(9_000_009)), "outside-layout")
    # links: to a file they count as what they name, to nothing they are unreadable
    link = tree.root / "CT/abd/normal/link.png"
    link.symlink_to(tree.root / "CT/abd/normal/a-first.png")
    tree.rows.append(("radiology_ai/CT/abd/normal/link.png", "abd-normal", "train"))
    reasons["CT/abd/normal/link.png"] = "duplicate-pixels"
    (tree.root / "CT/abd/normal/broken.png").symlink_to(tree.root / "nowhere")
    tree.rows.append(("radiology_ai/CT/abd/normal/broken.png", "abd-normal", "train"))
    reasons["CT/abd/normal/broken.png"] = "unreadable"
    (tree.root / "US/loop").symlink_to(tree.root / "MR", target_is_directory=True)
    return reasons


if __name__ == "__main__":
    made = write_tree(Path(sys.argv[1]), images=int(sys.argv[2]) if len(sys.argv) > 2 else 5)
    add_traps(made)
    made.write_lists()
    print(made.root)


def run(home: Home, root: Path, **options: Any) -> IngestReport:
    report = ingest(home, site="siteA", roots=[root], layout="radimagenet", workers=1, **options)
    assert report.files == report.accepted_files + sum(report.refused.values())
    return report


def rows(home: Home, query: str) -> list[tuple[Any, ...]]:
    db = sqlite3.connect(home.catalog)
    try:
        return db.execute(query).fetchall()
    finally:
        db.close()


def state(home: Home) -> list[tuple[Any, ...]]:
    """Everything about the images that does not depend on the order of decoding."""
    return rows(
        home,
        "SELECT i.path_key, patient, instance, split, modality, anatomy, digest, f.reason, group_concat(l.label)"
        " FROM images i JOIN files f USING (path_key) LEFT JOIN image_labels l ON l.image = i.id GROUP BY i.id"
        " ORDER BY digest",
    )


def split_by_pixels(home: Home) -> dict[bytes, str]:
    (shard,) = map_shards(home.cache, slots=rows(home, "SELECT count(*) FROM images")[0][0])
    return {shard[slot].tobytes(): split for slot, split in rows(home, "SELECT slot, split FROM images")}
