"""The published RadImageNet as a site: labels, splits, duplicates, and everything accounted for."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rin.client import policy
from rin.client.data import TrainingData
from rin.client.home import Home
from rin.client.ingest.cache import map_shards
from rin.client.ingest.pipeline import IngestReport, explain, ingest
from rin.client.ingest.radimagenet import SPLIT_WARNING, label_of, listed_label_of, listed_path, place_of
from rin.client.ingest.report import PATIENTS_WARNING
from rin.client.site import read_site
from rin.client.status import status
from rin.client.trainer import Trainer
from rin.common.errors import ConfigError, RefusedError, StateError
from rin.common.labels import label_index, label_set
from tests.client.ingest.radimagenet_tree import (
    CLASSES,
    Tree,
    add_traps,
    png,
    rows,
    run,
    scan,
    split_by_pixels,
)

if TYPE_CHECKING:
    from tests.client.conftest import SmallSite

INDEX = label_index()


def labels_of(report: IngestReport) -> Counter[str]:
    return Counter(report.labels)


# names


def test_every_official_class_folder_is_its_label() -> None:
    for label in label_set():
        folder = f"{label.modality}/{label.anatomy}" if label.modality != "US" else "US"
        place = place_of(f"radiology_ai/{folder}/{label.finding}/x.png")
        assert place is not None
        assert label_of(place) == label.index
        for listed in (f"{label.anatomy}-{label.finding}", label.finding, label.name):
            assert listed_label_of(place, listed) == label.index


@pytest.mark.parametrize(
    ("folder", "listed", "name"),
    [
        ("MR/af/intra", "af-intra-articular", "MR_af_intra"),
        ("MR/knee/x", "intra-articular", "MR_knee_intra"),
        ("MR/brain/x", "brain-extra-axial", "MR_brain_extra"),
        ("MR/abd", "mriabd-normal", None),  # a folder of the other layout's depth
        ("MR/abd/x", "mriabd-normal", "MR_mriabd_normal"),
        ("MR/mriabd/x", "abd-normal", None),  # abd is CT's; it is not guessed that mriabd was meant
        ("CT/abd/x", "MR_mriabd_normal", None),
        ("CT/abd/normal", "abd-normal-variant", None),
        ("CT/abd/normal", "abd-Normal", None),
        ("CT/abd/normal", "", None),
        ("US/x", "usabd-gb", "US_usabd_gb"),
        ("US/x", "usthyroid-gb", None),
    ],
)
def test_listed_names_are_taken_by_the_letter(folder: str, listed: str, name: str | None) -> None:
    place = place_of(f"{folder}/x.png")
    found = listed_label_of(place, listed) if place else None
    assert found == (INDEX[name] if name else None)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("radiology_ai/CT/abd/normal/x.png", "CT/abd/normal/x.png"),
        ("./radiology_ai/CT/abd/normal/x.png", "CT/abd/normal/x.png"),
        ("radiology_ai\\CT\\abd\\normal\\x.png", "CT/abd/normal/x.png"),
        ("CT/abd/normal/x.png", "CT/abd/normal/x.png"),
        ("radiology_ai/CT/../../../etc/passwd", None),
        ("..\\radiology_ai\\CT\\x.png", None),
        ("/data/radiology_ai/CT/abd/normal/x.png", None),
        ("C:/radiology_ai/CT/abd/normal/x.png", None),
        ("CT//normal/x.png", None),
        ("", None),
    ],
)
def test_listed_paths_stay_in_the_archive(text: str, path: str | None) -> None:
    assert listed_path(text) == path


@given(st.text(max_size=60))
def test_no_listed_path_ever_leaves_the_archive(text: str) -> None:
    path = listed_path(text)
    if path is not None:
        assert os.path.normpath(f"/root/{path}") == f"/root/{path}"
        place_of(path)


# what comes in


def test_folders_alone_are_the_labels(tree: Tree, home: Home) -> None:
    report = run(home, tree.root)
    assert report.accepted == len(tree.labels)
    assert report.refused == {}
    assert labels_of(report) == Counter(tree.labels.values())
    assert report.facts == {"several_labels": 0, "several_splits": 0, "unused_lists": 0}
    shown = rows(home, "SELECT DISTINCT modality, anatomy, policy, rows, cols, bits, syntax FROM images ORDER BY 1, 2")
    assert shown[0] == ("CT", "abd", "full-range", 48, 48, 8, "png")
    assert {(modality, anatomy) for modality, anatomy, *_ in shown if modality == "US"} == {
        ("US", "usabd"),
        ("US", "usthyroid"),
    }


def test_lists_give_the_published_split(tree: Tree, home: Home) -> None:
    tree.rows = [(name, label, "test" if "/knee/" in name else "train") for name, label, _ in tree.rows]
    tree.write_lists(end="\r\n", mark="\ufeff")
    report = run(home, tree.root, csv=tree.lists)
    assert report.accepted == len(tree.labels)
    assert report.facts == {"several_labels": 0, "several_splits": 0, "missing": 0, "bad_rows": 0}
    assert rows(home, "SELECT split, anatomy = 'knee', count(*) FROM images GROUP BY 1, 2 ORDER BY 1") == [
        ("test", 1, 2),
        ("train", 0, 26),
    ]
    # without them it is the hash of the pixels: another one, and that of any other site
    shutil.copytree(tree.root, tree.parent / "other" / "radiology_ai")
    homes = [Home(home.root.with_name(name)) for name in ("b", "c")]
    reports = [run(homes[0], tree.root), run(homes[1], tree.parent / "other")]
    assert [report.facts["unused_lists"] for report in reports] == [3, 0]
    by_pixels = [split_by_pixels(each) for each in homes]
    assert by_pixels[0] == by_pixels[1]
    assert set(by_pixels[0].values()) != {"train"}
    assert homes[0].pseudonym_key.read_bytes() != homes[1].pseudonym_key.read_bytes()


def test_no_file_is_pinned_out_of_the_published_split(tree: Tree, home: Home) -> None:
    tree.rows = [(name, label, "test") for name, label, _ in tree.rows]
    run(home, tree.root, csv=tree.write_lists())
    assert rows(home, "SELECT DISTINCT split FROM images") == [("test",)]


def test_every_trap_has_its_reason(tree: Tree, home: Home) -> None:
    expected = add_traps(tree)
    report = run(home, tree.root, csv=tree.write_lists())
    found = {path.relative_to(tree.root).as_posix(): reason for path, reason in explain(home, [tree.root])}
    assert found == expected
    assert report.accepted == len(tree.labels) + 1
    assert report.unmapped == {
        "CT/abd-Normal": 1,
        "CT/abd-tumour": 1,
        "MR/abd-normal": 1,
        "US/usabd-normal-variant": 1,
    }
    assert report.facts == {"several_labels": 1, "several_splits": 1, "missing": 0, "bad_rows": 1}
    labels = rows(
        home, "SELECT label FROM image_labels WHERE image IN (SELECT id FROM images WHERE rows = 224) ORDER BY 1"
    )
    assert [label for (label,) in labels] == [INDEX["CT_abd_normal"], INDEX["CT_abd_urolithiasis"]]
    assert rows(home, "SELECT split FROM images WHERE rows = 224") == [("test",)]  # not in training as well
    # by folders alone
    plain = Home(home.root.with_name("plain"))
    report = run(plain, tree.root)
    found = {path.relative_to(tree.root).as_posix(): reason for path, reason in explain(plain, [tree.root])}
    assert found == expected
    assert report.unmapped == {"CT/abd/Normal": 1, "CT/abd/tumour": 1, "MR/abd/normal": 1, "US/normal-variant": 1}
    assert run(plain, tree.root).unmapped == report.unmapped


def test_what_lists_and_disk_do_not_share_is_counted(tree: Tree, home: Home) -> None:
    unlisted = tree.put("CT/abd/normal/unlisted.png", png(scan(9)), split=None)
    tree.put("CT/abd/normal/says-lesion.png", png(scan(10)), label="abd-liver_lesion")
    tree.put("CT/abd/strange/known-by-list.png", png(scan(11)), label="abd-gallstone")
    tree.put("CT/abd/normal/twice.png", png(scan(12)), split="train")
    tree.rows += [
        ("radiology_ai/CT/abd/normal/twice.png", "abd-normal", "val"),
        ("radiology_ai/CT/abd/normal/gone.png", "abd-normal", "train"),
        ("radiology_ai/CT/abd/normal/gone.png", "abd-normal", "test"),
        ("/radiology_ai/CT/abd/normal/abd000000.png", "abd-normal", "test"),
        ("../radiology_ai/CT/abd/normal/abd000000.png", "abd-normal", "test"),
        ("radiology_ai/CT/abd/normal/a,b.png", "abd-normal", "val"),
    ]
    report = run(home, tree.root, csv=tree.write_lists())
    assert report.facts == {"several_labels": 0, "several_splits": 0, "missing": 1, "bad_rows": 3}
    assert report.refused == {"label-conflict": 1, "unlisted": 1}
    assert ("unlisted", unlisted) in {(reason, path) for path, reason in explain(home, [tree.root])}
    assert report.labels["CT_abd_gallstone"] == 1
    assert report.accepted == len(tree.labels) + 2
    (split,) = rows(
        home, "SELECT split FROM images WHERE digest IN (SELECT digest FROM images WHERE rows = 224) ORDER BY 1"
    )[-1]
    assert split == "val"  # twice.png: val before train


def test_pictures_keep_their_shape_and_grey_values(home: Home, tmp_path: Path) -> None:
    tree = Tree(tmp_path / "data")
    square, wide = scan(1, 256, 256), scan(2, 64, 128)
    tree.put("CT/abd/normal/a.png", png(square))
    tree.put("CT/abd/normal/b.png", png(wide))
    run(home, tree.root)
    (shard,) = map_shards(home.cache, slots=2)
    np.testing.assert_array_equal(shard[0], square)
    assert shard[1, 64:192].any()
    assert not shard[1, :64].any()
    assert not shard[1, 192:].any()


def test_an_empty_archive_is_called_empty(home: Home, tmp_path: Path) -> None:
    (tmp_path / "data" / "CT").mkdir(parents=True)
    told: list[str] = []
    report = run(home, tmp_path / "data", warn=told.append)
    assert (report.files, report.empty_roots) == (0, 1)
    assert "holds no file" in told[-1]


# no patients


def test_nobody_can_take_images_for_patients(tree: Tree, home: Home) -> None:
    tree.write_lists()
    report = run(home, tree.root, csv=tree.lists)
    plain = json.loads(json.dumps(report.as_json()))
    assert plain["patients"] == "unknown"
    assert plain["warning"] == PATIENTS_WARNING
    facts = status(home)["catalog"]
    assert facts["patients"] == "unknown"
    assert facts["warning"] == PATIENTS_WARNING
    data = TrainingData.open(home, labels=range(165), split="train")
    assert data.n_images == len(set(data.patient.tolist())) > 1
    assert not data.patients_known
    assert data.n_patients == 1  # what policy.min-patients is compared with
    assert TrainingData.open(home, labels=[], split="train").n_patients == 0


def test_the_floor_of_patients_wants_a_persons_word(small_site: Callable[..., SmallSite]) -> None:
    """60 images of unknown patients are no 20 patients; a person may say that one is enough."""
    site = small_site(patients=30)
    with sqlite3.connect(site.home.catalog) as db:
        db.execute("INSERT INTO meta VALUES ('patients', 'unknown')")
    db.close()
    with pytest.raises(RefusedError) as refused:
        Trainer(site.home).train(site.request(), site.plan_bytes, lambda _: None, lambda: "")
    assert refused.value.code == "policy"
    assert "1 patients are in training here, this site wants 20" in refused.value.message
    site.home.site_toml.write_text(site.home.site_toml.read_text() + "min-patients = 1\n")
    settings, digest = read_site(site.home), site.request().plan
    data = TrainingData.open(site.home, labels=settings.labels.rows(), split="train")
    assert policy.check(site.plan, digest, settings, {digest}, patients=data.n_patients) == []


def test_a_site_file_may_say_all_of_it(tree: Tree, home: Home) -> None:
    tree.write_lists()
    home.site_toml.parent.mkdir(parents=True)
    lists = ", ".join(f'"{path}"' for path in tree.lists)
    home.site_toml.write_text(
        f'site = "S"\n[archive]\nroots = ["{tree.root}"]\nlayout = "radimagenet"\ncsv = [{lists}]\n'
    )
    command = [sys.executable, "-m", "rin.client.cli", "ingest", "--home", str(home.root), "--json"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (told["accepted"], told["patients"], told["facts"]["missing"]) == (len(tree.labels), "unknown", 0)


def test_a_home_has_one_layout(tree: Tree, home: Home) -> None:
    run(home, tree.root)
    with pytest.raises(StateError, match="another layout"):
        ingest(home, site="siteA", roots=[tree.root])
    other = Home(home.root.with_name("other"))
    ingest(other, site="siteA", roots=[tree.root], workers=1)
    with sqlite3.connect(other.catalog) as db:
        db.execute("DELETE FROM meta WHERE key IN ('layout', 'patients')")  # as an earlier release left it
    db.close()
    with pytest.raises(StateError, match="another layout"):
        run(other, tree.root)
    assert status(other)["catalog"]["patients"] == 0


# bad arguments


def test_wrong_arguments_touch_nothing(tree: Tree, home: Home, tmp_path: Path) -> None:
    (train, *_) = tree.write_lists()
    odd = tmp_path / "odd_train.csv"
    odd.write_text("path;label\n")
    binary = tmp_path / "binary_val.csv"
    binary.write_bytes(b"\xff\xfe\x00filename")
    unnamed = tmp_path / "list.csv"
    unnamed.write_bytes(train.read_bytes())
    (tmp_path / "empty").mkdir()
    cases: list[tuple[list[Path], dict[str, Any], str]] = [
        ([tree.root, tmp_path / "empty"], {}, "one root"),
        ([tmp_path / "empty"], {}, "none of CT, MR and US"),
        ([tree.root / "CT"], {}, "none of CT, MR and US"),
        ([tree.root], {"csv": [odd]}, "columns are path;label"),
        ([tree.root], {"csv": [binary]}, "not UTF-8"),
        ([tree.root], {"csv": [unnamed]}, "which split"),
        ([tree.root], {"csv": [tmp_path / "nowhere.csv"]}, "is missing"),
        ([tree.root], {"labels": train}, "labels from folders"),
    ]
    for roots, options, words in cases:
        with pytest.raises(ConfigError, match=words):  # in one line, before the long word on patients
            ingest(home, site="siteA", roots=roots, layout="radimagenet", warn=pytest.fail, **options)
    with pytest.raises(ConfigError, match="belongs to layout"):
        ingest(home, site="siteA", roots=[tree.root], csv=[train])
    with pytest.raises(ConfigError, match="not known"):
        ingest(home, site="siteA", roots=[tree.root], layout="nifti")
    assert not home.root.exists()


def test_nothing_identifying_is_kept(tree: Tree, home: Home) -> None:
    tree.put("CT/abd/normal/CANARY-NAME.png", png(scan(20)), label="abd-CANARY_LABEL")
    tree.put("CT/abd/CANARY_FOLDER/x.png", png(scan(21)))
    run(home, tree.root, csv=tree.write_lists())
    for path in home.root.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for word in (b"CANARY", b"radiology_ai", b"RadiologyAI", b"abd0000"):
                assert word not in data, (path.name, word)


# as a user types it


def test_the_command_says_it_loudly(tree: Tree, tmp_path: Path) -> None:
    add_traps(tree)
    tree.write_lists()
    lists = [part for path in tree.lists for part in ("--csv", str(path))]
    base = [sys.executable, "-m", "rin.client.cli", "ingest", "--site", "siteA", "--home", str(tmp_path / "home")]
    base += ["--root", str(tree.root), "--layout", "radimagenet", *lists]
    sheet = tmp_path / "sheet.png"
    done = subprocess.run([*base, "--contact-sheet", str(sheet)], capture_output=True, text=True, check=True)
    assert done.stderr.count(f"WARNING: {PATIENTS_WARNING}") == 2  # before the work and after it
    assert "rows of the lists that name no file of the layout" in done.stdout
    assert "US_usabd_gb" in done.stdout
    assert sheet.stat().st_size > 10_000
    again = subprocess.run([*base, "--json"], capture_output=True, text=True, check=True)
    told = json.loads(again.stdout)
    assert (told["decoded"], told["patients"], told["accepted"]) == (0, "unknown", len(tree.labels) + 1)
    shown = subprocess.run([*base, "--explain"], capture_output=True, text=True, check=True).stdout
    assert f"too-large\t{tree.root}/CT/abd/normal/bomb.png" in shown
    said = subprocess.run(
        [sys.executable, "-m", "rin.client.cli", "status", "--home", str(tmp_path / "home")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert PATIENTS_WARNING in said
    assert next(iter(CLASSES)) not in said


# the split's source is pinned


def test_without_the_lists_again_no_test_image_becomes_a_training_image(tree: Tree, home: Home) -> None:
    tree.rows = [(name, label, "test") for name, label, _ in tree.rows]
    told: list[str] = []
    run(home, tree.root, csv=tree.write_lists())
    with pytest.raises(StateError, match="split of this catalog") as refused:
        run(home, tree.root)
    assert "--csv" in refused.value.step
    assert rows(home, "SELECT DISTINCT split FROM images") == [("test",)]
    run(home, tree.root, csv=tree.lists[::-1], warn=told.append)  # the same ones in another order
    assert told == [PATIENTS_WARNING]
    tree.rows = [(name, label, "val") for name, label, _ in tree.rows]
    run(home, tree.root, csv=tree.write_lists(), warn=told.append)
    assert told[1:] == [SPLIT_WARNING, PATIENTS_WARNING]
    assert rows(home, "SELECT DISTINCT split FROM images") == [("val",)]


def test_lists_after_none_are_a_loud_warning(tree: Tree, home: Home) -> None:
    told: list[str] = []
    run(home, tree.root)
    run(home, tree.root, csv=tree.write_lists(), warn=told.append)
    assert SPLIT_WARNING in told
    with pytest.raises(StateError, match="split of this catalog"):
        run(home, tree.root)


@pytest.mark.parametrize("lists", [True, False])
def test_a_catalog_of_an_earlier_release_knows_its_split(tree: Tree, home: Home, lists: bool) -> None:
    given, told = tree.write_lists() if lists else [], list[str]()
    run(home, tree.root, csv=given)
    with sqlite3.connect(home.catalog) as db:
        db.execute("DELETE FROM meta WHERE key = 'split'")
    db.close()
    if lists:
        with pytest.raises(StateError, match="split of this catalog"):
            run(home, tree.root)
    run(home, tree.root, csv=given, warn=told.append)
    assert told == [PATIENTS_WARNING]
