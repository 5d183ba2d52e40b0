"""Where a task's images come from: one adapter a source, each giving the same `Dataset`."""

from __future__ import annotations

import csv
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt

from rin.common.errors import ConfigError
from rin.common.files import canonical_json
from rin.server import phantom

logger = logging.getLogger(__name__)

SIDE: Final = 256  # pixels a side of every image, the geometry of a site's cache
SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
TEST_SHARE: Final = 0.3
PATIENTS: Final = "patients.csv"
Grey = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Images of one task, split into training and test part.

    There is no validation part: a recipe is fixed beforehand, and nothing is chosen by looking at held-out images.

    Args:
        images: uint8 grey (images, 256, 256).
        targets: int64 (images,), the index in `classes`.
        masks: uint8 0 or 1 (images, 256, 256), or None.
        groups: int64 (images,) patient numbers, or None where no patient is known.
        test: bool (images,), True for the test part.
        facts: counts and remarks for the report, JSON values.
    """

    images: Grey
    targets: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    test: npt.NDArray[np.bool_]
    facts: dict[str, Any]
    masks: Grey | None = None
    groups: npt.NDArray[np.int64] | None = None

    def digest(self) -> str:
        """Hex SHA-256 over everything that a score depends on; a stored score is reused only for the same digest."""
        sha = hashlib.sha256(canonical_json(list(self.classes)))
        for array in (self.images, self.targets, self.test, self.masks, self.groups):
            sha.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()


def phantom_dataset(name: str, *, train: int, test: int) -> Dataset:
    """`train` and `test` images of the phantom task `name`, drawn from two seeds, so that no image is in both."""
    parts = [phantom.task_images(name, train, 11), phantom.task_images(name, test, 12)]
    images, targets, masks = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    facts = {
        "source": "phantom",
        "training_images": train,
        "test_images": test,
        "patients": "each image is another phantom patient",
    }
    return Dataset(images, targets, phantom.TASKS[name], np.arange(train + test) >= train, facts, masks)


def image_folder_dataset(root: Path, *, with_masks: bool = False) -> Dataset:
    """Images of `root/<class>/<image>`, without exact duplicates, split 70/30 by content within each class.

    Two files with the same pixels count as one image; where they lie in different classes, none of them is used. An
    image of one single grey value is dropped. `<image>_mask*.png` are masks, never images. `patients.csv` in `root`
    (columns filename, patient; filename relative to `root` or bare) keeps a patient's images on one side of the split.

    Args:
        with_masks: take only images that have a mask, and read it.

    Raises:
        ConfigError: no folder, fewer than two classes (one is enough with masks), or too few images; `patients.csv`
            cannot be read, leaves an image out, or does not say for certain whose image one is.
    """
    classes = _classes(root, least=1 if with_masks else 2)
    dropped: Counter[str] = Counter()
    found = list(_distinct(root, classes, dropped))
    if with_masks:
        found = [image for image in found if image.masks] or _fail(root, "no image has a <name>_mask.png beside it")
    patients = _patients(root)
    _check_bare(root, classes, patients)
    keys = [patients.get(_below(root, image.path)) or patients.get(image.path.name) or None for image in found]
    known = bool(patients) and None not in keys
    if patients and not known:
        _fail(root, f"{PATIENTS} does not name the patient of {keys.count(None)} of {len(keys)} images")
    units = [str(key) if known else image.digest for key, image in zip(keys, found, strict=True)]
    targets = np.array([image.target for image in found], np.int64)
    test = split(units, targets)
    facts = {
        "source": "image folder",
        "files": sum(dropped.values()) + len(found),
        "images": {name: int((targets == index).sum()) for index, name in enumerate(classes)},
        "dropped": dict(sorted(dropped.items())),
        "training_images": int((~test).sum()),
        "test_images": int(test.sum()),
        "patients": f"{len(set(units))} patients, each on one side of the split"
        if known
        else "no patient ids exist, so images of one patient may be on both sides of the split",
    }
    masks = np.stack([_mask(image.masks) for image in found]) if with_masks else None
    groups = np.unique(units, return_inverse=True)[1].astype(np.int64) if known else None
    return Dataset(np.stack([i.pixels for i in found]), targets, classes, test, facts, masks, groups)


def split(units: list[str], targets: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which images are test images: in every class the `TEST_SHARE` of units whose SHA-256 ranks first.

    Args:
        units: what must not be torn apart, a patient or an image's own digest; its class is that of its first image.

    Raises:
        ConfigError: a class would be left without a training or a test image.
    """
    home: dict[str, int] = {}
    for unit, target in zip(units, targets.tolist(), strict=True):
        home.setdefault(unit, target)
    chosen: set[str] = set()
    for target in sorted(set(home.values())):
        ranked = sorted((u for u, t in home.items() if t == target), key=lambda u: hashlib.sha256(u.encode()).digest())
        chosen.update(ranked[: round(len(ranked) * TEST_SHARE)])
    test = np.array([unit in chosen for unit in units])
    for target in set(targets.tolist()):
        if len(set(test[targets == target].tolist())) < 2:
            raise ConfigError(
                f"class number {target} has too few images or patients to split into training and test part",
                step="bring at least ten images, or three patients, a class",
            )
    return test


@dataclass(frozen=True, slots=True)
class _Image:
    path: Path
    target: int
    pixels: Grey
    digest: str
    masks: list[Path]


def _classes(root: Path, *, least: int) -> tuple[str, ...]:
    if not root.is_dir():
        raise ConfigError(f"{root} is no folder", step="give a folder that holds one folder of images a class")
    names = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and any(_files(entry))))
    if len(names) < least:
        _fail(root, f"{len(names)} folders with images are found, at least {least} are needed")
    return names


def _fail(root: Path, what: str) -> Any:
    raise ConfigError(f"{root.name}: {what}", step="lay images out as <class>/<image>.png, see the manual of bench")


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES and "_mask" not in p.stem)


def _distinct(root: Path, classes: tuple[str, ...], dropped: Counter[str]) -> Iterator[_Image]:
    """Images in order of class and name, without unreadable, constant, duplicate and conflicting ones."""
    seen: dict[str, _Image] = {}
    conflicts: set[str] = set()
    for target, name in enumerate(classes):
        for path in _files(root / name):
            grey = read_grey(path)
            if grey is None or grey.min() == grey.max():
                dropped["unreadable" if grey is None else "constant"] += 1
                continue
            digest = hashlib.sha256(repr(grey.shape).encode() + grey.tobytes()).hexdigest()
            if (first := seen.get(digest)) is None:
                masks = sorted(path.parent.glob(f"{_literal(path.stem)}_mask*"))
                seen[digest] = _Image(path, target, pad_to_square(grey), digest, masks)
            elif first.target == target and digest not in conflicts:
                dropped["duplicate"] += 1
            else:
                conflicts.add(digest)
                dropped["conflict"] += 1
    dropped["conflict"] += len(conflicts)
    return iter([image for image in seen.values() if image.digest not in conflicts])


def _literal(stem: str) -> str:
    """`stem` without meaning for glob: names like `benign [1]` occur."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in stem)


def read_grey(path: Path) -> Grey | None:
    """The picture in `path` as uint8 grey (rows, columns), on black where it is transparent; None if unreadable.

    Grey, RGB, RGBA and palette files of 8 or 16 bits are read; the orientation tag of photographs is not applied.
    """
    data = np.frombuffer(path.read_bytes(), np.uint8)
    try:
        image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if len(data) else None
    except cv2.error:
        return None
    if image is None or image.dtype not in (np.uint8, np.uint16):
        return None
    if image.dtype == np.uint16:
        image = (image // 257).astype(np.uint8)
    if image.ndim == 2:
        return np.asarray(image, np.uint8)
    if image.shape[2] == 4:
        alpha = image[:, :, 3:].astype(np.uint16)
        image = (image[:, :, :3] * alpha // 255).astype(np.uint8)
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), np.uint8)


def pad_to_square(grey: Grey) -> Grey:
    """`grey` (rows, columns) scaled to fit 256x256 with its aspect kept, centred on black."""
    rows, columns = grey.shape
    scale = SIDE / max(rows, columns)
    size = max(1, round(columns * scale)), max(1, round(rows * scale))
    small = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    top, left = (SIDE - small.shape[0]) // 2, (SIDE - small.shape[1]) // 2
    square = np.zeros((SIDE, SIDE), np.uint8)
    square[top : top + small.shape[0], left : left + small.shape[1]] = small
    return square


def _mask(paths: list[Path]) -> Grey:
    """Union of the masks of one image: uint8 0 or 1."""
    masks = [grey for path in paths if (grey := read_grey(path)) is not None]
    union = np.stack([pad_to_square(grey) for grey in masks]).max(axis=0)
    return np.asarray(union > 127, np.uint8)


def _patients(root: Path) -> dict[str, str]:
    """File name to patient from `patients.csv`; empty where there is none."""
    path = root / PATIENTS
    if not path.exists():
        return {}
    patients: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not {"filename", "patient"} <= set(rows.fieldnames or ()):
                raise ConfigError(f"{PATIENTS} lacks a column", step="give it the columns filename and patient")
            for row in rows:
                name, patient = row["filename"] or "", row["patient"] or ""
                if patients.setdefault(name, patient) != patient:
                    raise ConfigError(
                        f"{root.name}: {PATIENTS} gives {name} two patients",
                        step="name each file once; files of the same name as <class>/<name>",
                    )
    except (OSError, UnicodeDecodeError, csv.Error):
        raise ConfigError(
            f"{root.name}: {PATIENTS} cannot be read as UTF-8 text in columns", step="save it as CSV in UTF-8"
        ) from None
    return patients


def _below(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _check_bare(root: Path, classes: tuple[str, ...], patients: dict[str, str]) -> None:
    """Raise ConfigError where a bare name may mean two files, even if one of them is not used in the end."""
    paths = [path for name in classes for path in _files(root / name)] if patients else []
    count = Counter(path.name for path in paths if path.name in patients and _below(root, path) not in patients)
    if twice := sorted(name for name, times in count.items() if times > 1):
        raise ConfigError(
            f"{root.name}: {PATIENTS} names {twice[0]}, and {count[twice[0]]} files are called so",
            step="name them as <class>/<name>, for they may be of different patients",
        )
