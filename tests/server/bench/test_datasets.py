"""Datasets: real image files of every mode in a folder, their duplicates, their split."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from rin.common.errors import ConfigError
from rin.server.bench.datasets import image_folder_dataset, pad_to_square, phantom_dataset, read_grey, split

RNG = np.random.default_rng(0)


def save(path: Path, pixels: np.ndarray, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def noise(rows: int = 20, columns: int = 20) -> np.ndarray:
    return RNG.integers(0, 256, (rows, columns), dtype=np.uint8)


def folder(root: Path, classes: int = 2, each: int = 10) -> Path:
    for index in range(classes):
        for image in range(each):
            save(root / f"class{index}" / f"{image}.png", noise())
    return root


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_every_mode_reads_as_the_same_grey(tmp_path: Path, mode: str) -> None:
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (8, 1))
    grey = read_grey(save(tmp_path / "image.png", ramp, mode))
    assert grey is not None
    assert grey.shape == ramp.shape
    assert np.abs(grey.astype(int) - ramp).max() <= (8 if mode == "P" else 1)


def test_transparent_is_black_and_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    picture = np.full((4, 4, 4), 200, np.uint8)
    picture[:2, :, 3] = 0
    picture[2:, :, 3] = 255
    Image.fromarray(picture, "RGBA").save(tmp_path / "clear.png")
    clear = read_grey(tmp_path / "clear.png")
    cv2.imwrite(str(tmp_path / "deep.png"), np.array([[0, 32768, 65535]], np.uint16))
    deep = read_grey(tmp_path / "deep.png")
    assert clear is not None
    assert deep is not None
    assert clear[:, 0].tolist() == [0, 0, 200, 200]
    assert deep.tolist() == [[0, 127, 255]]


@pytest.mark.parametrize("shape", [(300, 100), (100, 300), (7, 500), (256, 256), (1, 1)])
def test_the_aspect_is_kept_and_nothing_is_cropped(shape: tuple[int, int]) -> None:
    square = pad_to_square(np.full(shape, 255, np.uint8))
    rows, columns = np.flatnonzero(square.any(axis=1)), np.flatnonzero(square.any(axis=0))
    assert square.shape == (256, 256)
    assert len(rows) == max(1, round(256 * shape[0] / max(shape)))
    assert len(columns) == max(1, round(256 * shape[1] / max(shape)))
    assert (square[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == 255).all()


def test_duplicates_conflicts_constant_and_broken_files_are_counted(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    pixels, shared = noise(), noise()
    save(root / "class0" / "a.png", pixels)
    save(root / "class0" / "a again.png", pixels, "RGB")
    for name in ("class0", "class1"):
        save(root / name / "shared.png", shared)
    save(root / "class1" / "shared again.png", shared)
    save(root / "class1" / "empty.png", np.zeros((9, 9), np.uint8))
    (root / "class1" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    (root / "class1" / "notes.txt").write_text("no image")
    data = image_folder_dataset(root)
    assert data.facts["dropped"] == {"duplicate": 1, "conflict": 3, "constant": 1, "unreadable": 1}
    assert data.facts["images"] == {"class0": 11, "class1": 10}
    assert data.facts["files"] == 27
    assert data.images.shape == (21, 256, 256)
    assert data.images.dtype == np.uint8


def test_the_split_depends_on_pixels_only_and_is_stratified(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", classes=3, each=20)
    before = image_folder_dataset(root)
    for path in sorted(root.rglob("*.png")):
        path.rename(path.with_name(f"z{hash(path.name) % 1000:03d}-{path.name}"))
    after = image_folder_dataset(root)
    assert [int(before.test[before.targets == c].sum()) for c in range(3)] == [6, 6, 6]
    assert {image.tobytes() for image in before.images[before.test]} == {i.tobytes() for i in after.images[after.test]}
    assert "no patient ids" in before.facts["patients"]
    assert before.groups is None


def test_a_patient_is_on_one_side_of_the_split(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", each=12)
    files = sorted(root.rglob("*.png"))
    lines = [f"{path.relative_to(root).as_posix()},P{index // 3}" for index, path in enumerate(files)]
    (root / "patients.csv").write_text("filename,patient\n" + "\n".join(lines))
    data = image_folder_dataset(root)
    assert data.groups is not None
    assert len(set(data.groups.tolist())) == 8
    assert not set(data.groups[data.test].tolist()) & set(data.groups[~data.test].tolist())
    (root / "patients.csv").write_text("filename,patient\n" + "\n".join(lines[1:]))
    with pytest.raises(ConfigError, match=r"does not name the patient of 1 of 24"):
        image_folder_dataset(root)


def test_no_two_patients_are_taken_for_one(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")  # 0.png to 9.png in each class
    paths = sorted(root.rglob("*.png"))
    cases = {
        "two patients": [f"{path.name},P{index}" for index, path in enumerate(paths)],
        "0.png, and 2 files": [f"{name}.png,P{name}" for name in range(10)],
    }
    for words, lines in cases.items():
        (root / "patients.csv").write_text("filename,patient\n" + "\n".join(lines))
        with pytest.raises(ConfigError, match=words) as error:
            image_folder_dataset(root)
        assert "<class>/<name>" in error.value.step
    save(root / "class1" / "only-here.png", noise())
    lines = [f"{path.relative_to(root).as_posix()},P{index // 2}" for index, path in enumerate(paths)]
    (root / "patients.csv").write_text(
        "\n".join(["filename,patient", *lines, "only-here.png,P99", "only-here.png,P99"])
    )
    assert image_folder_dataset(root).facts["patients"].startswith("11 patients")


def test_a_bare_name_of_a_file_that_is_not_used_is_no_certainty(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    for name in ("class0", "class1"):
        save(root / name / "x.png", noise())
    (root / "class0" / "x.png").write_bytes(b"broken")
    lines = [f"{name}/{number}.png,P{number}" for name in ("class0", "class1") for number in range(10)]
    (root / "patients.csv").write_text("\n".join(["filename,patient", *lines, "x.png,P1"]))
    with pytest.raises(ConfigError, match=r"x\.png, and 2 files"):
        image_folder_dataset(root)


def test_patients_in_another_encoding_are_one_line(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    (root / "patients.csv").write_bytes("filename,patient\n0.png,M\xfcller\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8") as error:
        image_folder_dataset(root)
    assert "CSV" in error.value.step


def test_masks_are_never_images_and_their_union_is_read(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for index in range(6):
        save(root / "lesion" / f"case [{index}].png", noise(64, 64))
        left, right = np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8)
        left[:, :16], right[:, 48:] = 255, 255
        save(root / "lesion" / f"case [{index}]_mask.png", left)
        save(root / "lesion" / f"case [{index}]_mask_1.png", right)
    save(root / "lesion" / "without.png", noise(64, 64))
    data = image_folder_dataset(root, with_masks=True)
    assert data.masks is not None
    assert data.masks.shape == (6, 256, 256)
    assert data.masks.mean() == pytest.approx(0.5, abs=0.01)
    assert set(np.unique(data.masks).tolist()) == {0, 1}


@pytest.mark.parametrize("classes", [0, 1])
def test_a_folder_that_is_no_task_says_what_is_missing(tmp_path: Path, classes: int) -> None:
    with pytest.raises(ConfigError, match="at least 2 are needed"):
        image_folder_dataset(folder(tmp_path, classes=classes))
    with pytest.raises(ConfigError, match="no folder"):
        image_folder_dataset(tmp_path / "nowhere")


def test_too_few_images_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match="too few"):
        split(["a", "b"], np.array([0, 1]))


def test_a_phantom_dataset_has_disjoint_parts_and_a_stable_digest() -> None:
    data = phantom_dataset("phantom-nodule", train=6, test=10)
    assert data.test.tolist() == [False] * 6 + [True] * 10
    assert set(data.targets.tolist()) == {0, 1}
    assert len({image.tobytes() for image in data.images}) == 16
    assert data.digest() == phantom_dataset("phantom-nodule", train=6, test=10).digest()
    assert data.digest() != phantom_dataset("phantom-nodule", train=5, test=11).digest()
