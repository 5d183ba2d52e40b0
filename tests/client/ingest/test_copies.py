"""Files that hold the same pixels: whose word counts, also when ingest runs again, files change, or it is killed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rin.client.home import Home
from tests.client.ingest.radimagenet_tree import (
    Tree,
    add_traps,
    png,
    rows,
    run,
    scan,
    split_by_pixels,
    state,
    write_tree,
)

if TYPE_CHECKING:
    pass


def test_the_order_of_the_walk_does_not_matter_for_labels_and_split(tree: Tree, tmp_path: Path, home: Home) -> None:
    """The test copy first, the training copy first: the image stands in the test split with both labels."""
    for name, first in (("a", "CT/abd/ascites"), ("b", "CT/abd/urolithiasis")):
        other = {"CT/abd/ascites": "CT/abd/urolithiasis", "CT/abd/urolithiasis": "CT/abd/ascites"}[first]
        twin = Tree(tmp_path / name)
        twin.put(f"{first}/x.png", png(scan(5)), split="test")
        twin.put(f"{other}/x.png", png(scan(5)), split="train")
        twin.put("CT/abd/normal/y.png", png(scan(6)), split="train")
        each = Home(tmp_path / f"home-{name}")
        report = run(each, twin.root, csv=twin.write_lists())
        assert report.refused == {"duplicate-pixels": 1}
        assert report.labels == {"CT_abd_ascites": 1, "CT_abd_normal": 1, "CT_abd_urolithiasis": 1}
        assert rows(each, "SELECT split, count(*) FROM images GROUP BY 1 ORDER BY 1") == [("test", 1), ("train", 1)]


def test_a_second_run_decodes_nothing_and_says_the_same(tree: Tree, home: Home) -> None:
    add_traps(tree)
    tree.write_lists()
    first, before = run(home, tree.root, csv=tree.lists), state(home)
    for path in tree.root.rglob("*.png"):
        if path.is_file() and not path.is_symlink():
            stamp = path.stat()
            path.write_bytes(b"x" * stamp.st_size)  # whoever decodes it again will say so
            os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    second = run(home, tree.root, csv=tree.lists)
    assert second.decoded == 0
    keys = first.as_json().keys() - {"seconds", "decoded"}
    assert {key: second.as_json()[key] for key in keys} == {key: first.as_json()[key] for key in keys}
    assert state(home) == before


def test_other_lists_give_other_words_without_decoding(tree: Tree, home: Home) -> None:
    add_traps(tree)
    run(home, tree.root, csv=tree.write_lists())
    for path in tree.root.rglob("*0000*.png"):
        stamp = path.stat()
        path.write_bytes(b"x" * stamp.st_size)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    tree.rows = [(name, label, "val") for name, label, _ in tree.rows if "same-bytes" not in name]
    report = run(home, tree.root, csv=tree.write_lists())
    assert report.decoded == 0
    assert report.accepted == len(tree.labels) + 1
    assert report.facts["several_labels"] == 0  # the list no longer names the copy under the other class
    assert rows(home, "SELECT DISTINCT split FROM images") == [("val",)]


def test_a_copy_takes_over_when_its_owner_goes(home: Home, tmp_path: Path) -> None:
    tree = Tree(tmp_path / "data")
    for name in ("CT/abd/ascites/x.png", "CT/abd/normal/x.png"):
        tree.put(name, png(scan(5)))
    tree.put("CT/abd/normal/y.png", png(scan(6)))
    assert run(home, tree.root).labels == {"CT_abd_ascites": 1, "CT_abd_normal": 2}
    slots = rows(home, "SELECT slot FROM images ORDER BY 1")
    (tree.root / "CT/abd/ascites/x.png").unlink()  # somebody decided that it shows no ascites
    report = run(home, tree.root)
    assert (report.files, report.accepted, report.decoded, report.refused) == (2, 2, 0, {})
    assert report.labels == {"CT_abd_normal": 2}
    assert rows(home, "SELECT slot FROM images ORDER BY 1") == slots
    tree.put("CT/abd/normal/x.png", png(scan(7)))  # the owner changes: old pixels go, new ones come
    report = run(home, tree.root)
    assert (report.accepted, report.decoded) == (2, 1)
    assert rows(home, "SELECT count(*) FROM copies") == [(2,)]
    os.utime(tree.root / "CT/abd/normal/x.png", ns=(1, 1))
    report = run(home, tree.root)  # touched, not changed
    assert (report.accepted, report.decoded) == (2, 0)


_INGEST = (
    "import sys; from pathlib import Path; from rin.client.home import Home;"
    "from rin.client.ingest import pipeline, run; run.COMMIT_IMAGES = 5;"
    "pipeline.ingest(Home(Path(sys.argv[1])), site='siteA', roots=[Path(sys.argv[2])], layout='radimagenet',"
    " csv=[Path(each) for each in sys.argv[3:]], workers=1)"
)


def test_killed_at_any_moment_it_goes_on(home: Home, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "data", images=10, side=64)
    add_traps(tree)
    lists = tree.write_lists()
    calm = Home(tmp_path / "calm")
    wanted = run(calm, tree.root, csv=lists)
    home.pseudonym_key.parent.mkdir(parents=True)
    home.pseudonym_key.write_bytes(calm.pseudonym_key.read_bytes())
    dice = random.Random(3)
    assert sum(_killed(home, tree, dice.uniform(0, 0.03)) for _ in range(3)) >= 1
    report = run(home, tree.root, csv=lists)
    assert (report.accepted, report.refused, report.labels) == (wanted.accepted, wanted.refused, wanted.labels)
    assert report.decoded < report.accepted
    assert state(home) == state(calm)
    assert split_by_pixels(home) == split_by_pixels(calm)


def _killed(home: Home, tree: Tree, delay: float) -> bool:
    """Start an ingest and kill it `delay` seconds after it wrote something new; False if it was quicker."""
    shard = home.cache / "shard-00000.u8"
    size = shard.stat().st_size if shard.exists() else 0
    command = [sys.executable, "-c", _INGEST, str(home.root), str(tree.root), *map(str, tree.lists)]
    child = subprocess.Popen(command)
    while child.poll() is None and (not shard.exists() or shard.stat().st_size <= size):
        time.sleep(0.002)
    time.sleep(delay)
    child.kill()
    return child.wait() != 0
