"""The published RadImageNet as a source of images: folders are the labels, lists the split, and there are no patients.

Layout: `radiology_ai/<CT|MR>/<anatomy>/<class>/*.png` and `radiology_ai/US/<class>/*.png`; lists `filename,label`.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rin.client.ingest.catalog import ImageRow
from rin.client.ingest.copies import SPLITS, UNKNOWN
from rin.client.ingest.pixels import Layout
from rin.client.ingest.pseudonyms import split_of
from rin.client.ingest.reasons import Refused
from rin.client.ingest.workers import Job, Outcome
from rin.common.errors import ConfigError, StateError
from rin.common.files import sha256_file
from rin.common.labels import label_index, label_set, label_set_digest

if TYPE_CHECKING:
    from rin.client.ingest.run import Item, Run

FOLDER: Final = "radiology_ai"  # what the archive unpacks to, and the first part of every listed file name
# Names of the label set that end where the longer one had a hyphen, e.g. `intra` of `intra-articular`.
TRUNCATED: Final = frozenset({"intra", "extra"})
_SPLIT: Final = re.compile(r"(?:^|[_-])(train|val|test)$")
_HASH: Final = "hash"  # the split where no lists are given
_NO_LIST: Final = "none"
SPLIT_WARNING: Final = (
    "these lists are others than those that this catalog was split by: images may change sides, so held-out figures of"
    " every earlier training, and of one that goes on, are void"
)
_ROWS: Final = 65536  # list rows in one transaction
_NAMES: Final = 1000  # distinct unknown names that are told; a hostile list may hold a million
_SHOWN: Final = 80  # characters of one of them


@dataclass(frozen=True, slots=True)
class Place:
    """What the folders say about a file; `anatomy` is empty for ultrasound."""

    modality: str
    anatomy: str
    finding: str


def place_of(relative: str) -> Place | None:
    """Modality, anatomy and class by the path below the archive's root; None where the path is none of the layout."""
    parts = relative.split("/")
    parts = parts[1:] if parts[0] == FOLDER else parts
    if len(parts) == 4 and parts[0] in ("CT", "MR"):
        return Place(parts[0], parts[1], parts[2])
    return Place("US", "", parts[1]) if len(parts) == 3 and parts[0] == "US" else None


@functools.cache
def _classes() -> dict[Place, int]:
    """Every official class to its label index; those of ultrasound without their anatomy too."""
    found = {Place(label.modality, label.anatomy, label.finding): label.index for label in label_set()}
    return found | {Place("US", "", place.finding): index for place, index in found.items() if place.modality == "US"}


@functools.cache
def _anatomies() -> frozenset[tuple[str, str]]:
    return frozenset((label.modality, label.anatomy) for label in label_set())


@functools.lru_cache(4096)
def label_of(place: Place) -> int | None:
    """The label index of a class folder; None if the label set does not know it. Names are opaque: typos count."""
    classes, short = _classes(), place.finding.partition("-")[0]
    if (index := classes.get(place)) is not None or short not in TRUNCATED:
        return index
    return classes.get(Place(place.modality, place.anatomy, short))


@functools.lru_cache(4096)
def listed_label_of(place: Place, name: str) -> int | None:
    """The label index of a listed name, `<anatomy>-<class>`, a bare class or a full name, for a file at `place`."""
    index = label_index().get(name)
    if index is not None and label_set()[index].modality == place.modality:
        return index
    prefix, _, finding = name.partition("-")
    return label_of(
        Place(place.modality, prefix, finding)
        if (place.modality, prefix) in _anatomies()
        else Place(place.modality, place.anatomy, name)
    )


def listed_path(text: str) -> str | None:
    """A listed file name as the path below the root; None where it leaves the archive."""
    path = text.replace("\\", "/").removeprefix("./").removeprefix(f"{FOLDER}/")
    parts = path.split("/")
    return None if ".." in parts or "" in parts or "." in parts or ":" in parts[0] else path


class RadImageNet:
    """The source of layout `radimagenet`, see `run.Source`.

    Each image stands for a patient of its own, since the data names none. The split is that of the lists where they
    are given, else by an unkeyed hash of the image's own pixels, so that it is the same at every site.
    """

    patients_known = False

    def __init__(self, roots: Sequence[Path], lists: Sequence[Path]) -> None:
        """Check root and lists.

        Raises:
            ConfigError: several roots, a root without modalities, or a list that is missing or cannot be used.
        """
        if len(roots) != 1:
            raise ConfigError("layout radimagenet has one root", step=f"pass --root .../{FOLDER}")
        self._base = roots[0] / FOLDER if (roots[0] / FOLDER).is_dir() else roots[0]
        if not any((self._base / name).is_dir() for name in ("CT", "MR", "US")):
            raise ConfigError(f"{roots[0]} holds none of CT, MR and US", step=f"pass --root .../{FOLDER}")
        for path in lists:
            if not path.is_file():
                raise ConfigError(f"{path} is missing or no file", step="check --csv")
            next(_rows(path), None)
        self._lists = [(path, _split_of(path)) for path in lists]
        self._digests = sorted(f"{split} {sha256_file(path)}" for path, split in self._lists)
        text = "\n".join(["radimagenet", label_set_digest(), *self._digests])
        self.digest = hashlib.sha256(text.encode()).digest()[:16]
        self._of_folders: Counter[str] = Counter()
        self._of_lists: Counter[str] = Counter()
        self._bad_rows = 0

    @property
    def unmapped(self) -> Counter[str]:
        return self._of_folders + self._of_lists

    def start(self, run: Run) -> None:
        """Bring the catalog's list in line with the files; unknown names are counted in every run, stored in none.

        Raises:
            StateError: the split was that of lists, and none are given.
        """
        state = hashlib.sha256(self.digest + run.names.path(self._base)).hexdigest() if self._lists else _NO_LIST
        self._pin_split(run, state)
        rows = self._list(run)
        if run.catalog.meta("list") == state:
            for _ in rows:
                pass
            return
        run.catalog.set_meta("list", "incomplete")
        run.catalog.copies.clear_list()
        while part := list(islice(rows, _ROWS)):
            run.catalog.copies.add_to_list(part)
            run.catalog.commit()
        run.catalog.set_meta("list", state)

    def _pin_split(self, run: Run, state: str) -> None:
        """Where the split comes from is part of the catalog: another source makes test images training images.

        Args:
            state: what the catalog's list will be, see `start`.
        """
        source = run.names.of("lists", *(digest.encode() for digest in self._digests)).hex() if self._lists else _HASH
        before, listed = run.catalog.meta("split"), run.catalog.meta("list")
        if before is None and listed is not None:  # an earlier release wrote down the list only
            before = _HASH if listed == _NO_LIST else source if listed == state else "other lists"
        if before not in (None, source):
            if not self._lists:
                raise StateError(
                    "the split of this catalog is that of lists; without them test images would be trained on",
                    step="pass the lists again, --csv for each, or ingest into another --home",
                )
            run.warn(SPLIT_WARNING)
        run.catalog.set_meta("split", source)

    def begin(self, run: Run, item: Item) -> Callable[[], None]:
        place = place_of(item.found.relative)
        if place is None:
            raise Refused("outside-layout")
        labels, split = self._listed(run, item, place) if self._lists else (self._of_folder(item, place), None)
        known = item.known
        same = known is not None and known.stamp == item.stamp and run.catalog.copies.image_of(item.key) is not None
        if same and split is not None:
            return partial(_say, run, item, labels, split)
        item.frames = 1
        return partial(_finish, run, item, labels, split, run.pool.submit(Job(item.found.path, png=True)))

    def end(self, run: Run) -> None:
        while gone := run.catalog.copies.gone(run.number):
            for key in gone:
                run.catalog.forget_file(key)
            run.commit()

    def facts(self, run: Run) -> dict[str, int]:
        several, across = run.catalog.copies.shared()
        facts = {"several_labels": several, "several_splits": across}
        if self._lists:
            return facts | {"missing": run.catalog.copies.missing(run.number), "bad_rows": self._bad_rows}
        beside = [path for folder in (self._base, self._base.parent) for path in folder.glob("RadiologyAI_*.csv")]
        return facts | {"unused_lists": len(beside)}

    def _of_folder(self, item: Item, place: Place) -> tuple[int, ...]:
        label = label_of(place)
        if label is None:
            item.open = True  # so that its name is told in every run
            _count(self._of_folders, "/".join(filter(None, (place.modality, place.anatomy, place.finding))))
            raise Refused("unmapped-label")
        return (label,)

    def _listed(self, run: Run, item: Item, place: Place) -> tuple[tuple[int, ...], str]:
        """The list is what was published, so it decides; a folder that is another known class contradicts it."""
        found = run.catalog.copies.listed(item.key)
        if found is None:
            raise Refused("unlisted")
        labels = tuple(label for label in found[0] if label != UNKNOWN)
        if not labels:
            raise Refused("unmapped-label")
        if (folder := label_of(place)) is not None and folder not in labels:
            raise Refused("label-conflict")
        return labels, found[1]

    def _list(self, run: Run) -> Iterator[tuple[bytes, int, int]]:
        """(path key, label index, split) of every usable row."""
        for path, split in self._lists:
            rank = SPLITS.index(split)
            for name, label in _rows(path):
                relative = listed_path(name)
                place = place_of(relative) if relative else None
                if relative is None or place is None:
                    self._bad_rows += 1
                    continue
                index = listed_label_of(place, label)
                if index is None:
                    _count(self._of_lists, f"{place.modality}/{label}")
                yield run.names.path(f"{self._base}/{relative}"), UNKNOWN if index is None else index, rank


def _finish(run: Run, item: Item, labels: tuple[int, ...], split: str | None, job: Future[Outcome]) -> None:
    outcome = job.result()
    if outcome.reason or outcome.layout is None or not outcome.pictures:
        raise Refused(outcome.reason or "no-pixels")
    (picture,), copies = outcome.pictures, run.catalog.copies
    sha = hashlib.sha256(picture.pixels).digest()
    split = split or split_of(sha)
    digest = run.names.of("pixels", sha)
    image = copies.image_with(digest)
    if image is not None and image == copies.image_of(item.key):
        _say(run, item, labels, split)  # it was touched, not changed
        return
    run.forget(item)
    if image is not None:
        copies.put(item.key, image, labels, split)
        run.close(item, Counter({"duplicate-pixels": 1}), accepted=0)
        return
    image = run.add(item, _row(run, sha, digest, labels, split, outcome.layout, picture.policy), picture.pixels)
    copies.put_first(item.key, image, labels, split)
    run.close(item, Counter(), accepted=1)


def _say(run: Run, item: Item, labels: tuple[int, ...], split: str) -> None:
    """The pixels are in the cache: only what the file says about them is new."""
    image = run.catalog.copies.image_of(item.key)
    if image is None:
        raise Refused("unreadable")
    run.catalog.copies.put(item.key, image, labels, split)
    run.keep(item)


def _row(
    run: Run, sha: bytes, digest: bytes, labels: tuple[int, ...], split: str, layout: Layout, policy: str
) -> ImageRow:
    label, own = label_set()[labels[0]], run.names.of("image", sha)
    return ImageRow(
        patient=own,
        study=own,
        series=own,
        instance=own,
        frame=1,
        modality=label.modality,
        anatomy=label.anatomy,
        split=split,
        digest=digest,
        policy=policy,
        rows=layout.rows,
        cols=layout.cols,
        bits=layout.stored,
        photometric=layout.photometric,
        syntax=layout.syntax,
        lossy=False,
        labels=labels,
    )


def _split_of(path: Path) -> str:
    found = _SPLIT.search(path.stem.casefold())
    if found is None:
        raise ConfigError(
            f"{path.name} does not say which split it lists", step="end its name in _train, _val or _test, as published"
        )
    return found[1]


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """(filename, label) of a list, row by row; line ends and a byte order mark are whatever they are.

    Raises:
        ConfigError: it cannot be read, or its columns are others.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip().lower() for name in next(reader, [])]
            if "filename" not in header or "label" not in header:
                raise ConfigError(
                    f"{path.name}: the columns are {','.join(header)[:200] or 'missing'}", step="use `filename,label`"
                )
            name, label = header.index("filename"), header.index("label")
            for row in reader:
                if len(row) == len(header):
                    yield row[name].strip(), row[label].strip()
                elif row:
                    yield "", ""  # counted with the names that are no path
    except OSError:
        raise ConfigError(f"{path} cannot be read", step="check --csv") from None
    except (UnicodeDecodeError, csv.Error):
        raise ConfigError(f"{path.name}: not UTF-8 text in columns", step="take the published file as it is") from None


def _count(counter: Counter[str], name: str) -> None:
    """Names are shown on a terminal: printable, short, and not endlessly many."""
    shown = "".join(char if char.isprintable() else "?" for char in name[:_SHOWN])
    counter[shown if shown in counter or len(counter) < _NAMES else "(other names)"] += 1
