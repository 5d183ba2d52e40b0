"""The catalog: one row per image that came in, one reason per file or frame that did not, in SQLite."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rin.client.ingest.cache import MEND, SHARD_IMAGES
from rin.client.ingest.copies import SCHEMA as COPIES
from rin.client.ingest.copies import Copies
from rin.client.ingest.gone import Gone
from rin.client.ingest.report import PATIENTS_UNKNOWN
from rin.common.errors import StateError

SCHEMA_VERSION: Final = "1"

# An allow-list: keyed pseudonyms, enums and technical numbers; nothing of a header is kept in clear but these.
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (
    path_key BLOB PRIMARY KEY, stamp BLOB NOT NULL, labelling BLOB NOT NULL,
    reason TEXT, open INTEGER NOT NULL, seen INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS images (
    id INTEGER PRIMARY KEY, path_key BLOB NOT NULL,
    patient BLOB NOT NULL, study BLOB NOT NULL, series BLOB NOT NULL, instance BLOB NOT NULL, frame INTEGER NOT NULL,
    modality TEXT NOT NULL, anatomy TEXT NOT NULL, split TEXT NOT NULL,
    slot INTEGER NOT NULL UNIQUE, digest BLOB NOT NULL UNIQUE,
    policy TEXT NOT NULL, rows INTEGER NOT NULL, cols INTEGER NOT NULL, bits INTEGER NOT NULL,
    photometric TEXT NOT NULL, syntax TEXT NOT NULL, lossy INTEGER NOT NULL,
    UNIQUE (instance, frame)
);
CREATE INDEX IF NOT EXISTS images_path ON images (path_key);
CREATE TABLE IF NOT EXISTS image_labels (
    image INTEGER NOT NULL REFERENCES images (id) ON DELETE CASCADE, label INTEGER NOT NULL,
    PRIMARY KEY (image, label)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refusals (
    path_key BLOB NOT NULL, reason TEXT NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (path_key, reason)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS erased (slot INTEGER PRIMARY KEY);
"""


@contextlib.contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Turn what SQLite says about a damaged catalog into an error with a next step.

    Raises:
        StateError: the file is no database, its pages contradict each other, or its tables are missing.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:  # exactly that for a damaged file; its kinds are a full disk, a lock, ...
        if type(error) is sqlite3.DatabaseError or str(error).startswith(("no such table", "no such column")):
            raise StateError(f"{path.name} is damaged", step=MEND) from None
        raise


@dataclass(frozen=True, slots=True)
class Known:
    """What the catalog knows of a file from before."""

    stamp: bytes
    labelling: bytes
    reason: str | None
    open: bool
    seen: int


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One image: the columns of `images` but `id`, `path_key` and `slot`, and its label indices."""

    patient: bytes
    study: bytes
    series: bytes
    instance: bytes
    frame: int
    modality: str
    anatomy: str
    split: str
    digest: bytes
    policy: str
    rows: int
    cols: int
    bits: int
    photometric: str
    syntax: str
    lossy: bool
    labels: tuple[int, ...]


class Catalog:
    """The writer of one catalog file; every public method leaves the transaction open until `commit`."""

    def __init__(self, path: Path) -> None:
        """Open or make the catalog (0600, WAL, every commit durable).

        Raises:
            StateError: it was made by another schema version, or is damaged.
        """
        with undamaged(path):
            self._open(path)

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.executescript(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON;" + _SCHEMA + COPIES
        )
        self.copies, self.gone = Copies(self._db), Gone(self._db)
        self._db.execute("BEGIN")
        version = self.meta("schema")
        if version not in (None, SCHEMA_VERSION):
            self._db.close()
            raise StateError(f"{path.name} has schema {version}", step="use the release of rin that wrote it")
        if version is None:
            self.set_meta("schema", SCHEMA_VERSION)

    def close(self) -> None:
        """Close without committing what is open."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._db.close()

    def commit(self) -> None:
        """Make everything since the last commit durable, and begin anew."""
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")

    def meta(self, key: str) -> str | None:
        """One fact about the catalog as a whole."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def set_meta(self, key: str, value: str) -> None:
        """Set one fact."""
        self._db.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, value)
        )

    def tie(self, key: str, value: str, *, step: str) -> None:
        """Set a fact for ever.

        Raises:
            StateError: it was set to another value before; `step` is the operator's next step.
        """
        found = self.meta(key)
        if found is None:
            self.set_meta(key, value)
        elif found != value:
            raise StateError(f"the catalog was made with another {key}", step=step)

    @property
    def slots(self) -> int:
        """Slots of the cache that are committed."""
        return int(self.meta("slots") or 0)

    # files

    def known(self, path_key: bytes) -> Known | None:
        """The file's row, if it has one."""
        row = self._db.execute(
            "SELECT stamp, labelling, reason, open, seen FROM files WHERE path_key = ?", (path_key,)
        ).fetchone()
        return Known(row[0], row[1], row[2], bool(row[3]), row[4]) if row else None

    def mark_seen(self, path_key: bytes, run: int) -> None:
        """The file still exists in run `run`."""
        self._db.execute("UPDATE files SET seen = ? WHERE path_key = ?", (run, path_key))

    def put_file(
        self, path_key: bytes, *, stamp: bytes, labelling: bytes, reason: str | None, open_: bool, run: int
    ) -> None:
        """Record a file; `reason` is None if an image of it was accepted, `open_` if a label was not known."""
        self._db.execute(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", (path_key, stamp, labelling, reason, open_, run)
        )

    def forget_file(self, path_key: bytes) -> None:
        """Remove what is known of a file that changed; its slots are left for `erased`.

        An image of an archive without instance UIDs that another file holds too goes on as that file's.
        """
        self.copies.leave(path_key)
        self._db.execute("INSERT OR IGNORE INTO erased SELECT slot FROM images WHERE path_key = ?", (path_key,))
        for table in ("images", "refusals", "files"):
            self._db.execute(f"DELETE FROM {table} WHERE path_key = ?", (path_key,))

    def refuse(self, path_key: bytes, reason: str, count: int) -> None:
        """Count a reason against a file."""
        self._db.execute(
            "INSERT INTO refusals VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
            (path_key, reason, count),
        )

    # images

    def frames_of(self, instance: bytes) -> dict[int, tuple[int, bytes]]:
        """Frame to (image id, path key) of an instance."""
        rows = self._db.execute("SELECT frame, id, path_key FROM images WHERE instance = ?", (instance,))
        return {frame: (image, path_key) for frame, image, path_key in rows}

    def has_digest(self, digest: bytes) -> bool:
        """Whether the same pixels are already there."""
        return self._db.execute("SELECT 1 FROM images WHERE digest = ?", (digest,)).fetchone() is not None

    def add_image(self, path_key: bytes, image: ImageRow, *, slot: int) -> int:
        """Add one image with its labels; returns its id."""
        columns = (image.patient, image.study, image.series, image.instance, image.frame, image.modality)
        columns += (image.anatomy, image.split, slot, image.digest, image.policy, image.rows, image.cols, image.bits)
        columns += (image.photometric, image.syntax, image.lossy)
        marks = ", ".join("?" * (2 + len(columns)))
        cursor = self._db.execute(f"INSERT INTO images VALUES ({marks})", (None, path_key, *columns))
        added = cursor.lastrowid or 0
        self._label(added, image.labels)
        return added

    def relabel(self, image: int, labels: Sequence[int], path_key: bytes) -> None:
        """Give an image that is already in the cache other labels, or another file (one that was moved)."""
        self._db.execute("UPDATE images SET path_key = ? WHERE id = ?", (path_key, image))
        self._db.execute("DELETE FROM image_labels WHERE image = ?", (image,))
        self._label(image, labels)

    def _label(self, image: int, labels: Sequence[int]) -> None:
        self._db.executemany("INSERT INTO image_labels VALUES (?, ?)", [(image, label) for label in labels])

    def erased(self, limit: int = -1) -> list[int]:
        """Slots whose images were removed and whose pixels may still be there; -1 for all of them."""
        return [row[0] for row in self._db.execute("SELECT slot FROM erased ORDER BY slot LIMIT ?", (limit,))]

    def clear_erased(self, slots: Sequence[int]) -> None:
        """The pixels of these slots are zeros now."""
        self._db.executemany("DELETE FROM erased WHERE slot = ?", [(slot,) for slot in slots])

    def pin_train(self) -> None:
        """Give training one patient where the thresholds gave it none: the one with the smallest pseudonym.

        A site of one or two patients would otherwise have nothing to train on. Once pinned a patient stays.
        """
        patient = self._db.execute("SELECT min(patient) FROM images").fetchone()[0]
        if patient and self._db.execute("SELECT 1 FROM images WHERE split = 'train'").fetchone() is None:
            self._db.execute("UPDATE images SET split = 'train' WHERE patient = ?", (patient,))
            self.set_meta("pinned", " ".join([*(self.meta("pinned") or "").split(), patient.hex()]))

    def pinned(self) -> frozenset[bytes]:
        """Patients that train although the thresholds say otherwise."""
        return frozenset(bytes.fromhex(patient) for patient in (self.meta("pinned") or "").split())

    # reports

    def refused_files(self, run: int) -> dict[str, int]:
        """Reason to number of files of run `run` of which no image was accepted."""
        return self._counts(
            "SELECT reason, count(*) FROM files WHERE seen = ? AND reason NOT NULL GROUP BY reason", run
        )

    def refused_images(self, run: int) -> dict[str, int]:
        """Reason to number of frames that were refused in files of which another image was accepted."""
        return self._counts(
            "SELECT r.reason, sum(r.count) FROM refusals r JOIN files f USING (path_key)"
            " WHERE f.seen = ? AND f.reason IS NULL GROUP BY r.reason",
            run,
        )

    def totals(self, run: int) -> tuple[int, int, int]:
        """Files seen in the run, files with an image, images."""
        files, good = self._db.execute(
            "SELECT count(*), count(*) - count(reason) FROM files WHERE seen = ?", (run,)
        ).fetchone()
        images = self._db.execute(
            "SELECT count(*) FROM images JOIN files USING (path_key) WHERE seen = ?", (run,)
        ).fetchone()[0]
        return files, good, images

    def label_counts(self, run: int) -> dict[int, int]:
        """Label index to number of images of the run's files."""
        rows = self._db.execute(
            "SELECT label, count(*) FROM image_labels JOIN images ON images.id = image JOIN files USING (path_key)"
            " WHERE seen = ? GROUP BY label ORDER BY label",
            (run,),
        )
        return dict(rows.fetchall())

    def reasons(self, path_key: bytes) -> list[str]:
        """The reasons held against one file."""
        rows = self._db.execute("SELECT reason FROM refusals WHERE path_key = ? ORDER BY reason", (path_key,))
        return [row[0] for row in rows]

    def _counts(self, query: str, run: int) -> dict[str, int]:
        return dict(self._db.execute(query + " ORDER BY 1", (run,)).fetchall())


@dataclass(frozen=True, slots=True)
class CatalogImage:
    """One image as a reader sees it."""

    patient: bytes
    modality: str
    anatomy: str
    slot: int
    labels: tuple[int, ...]

    @property
    def place(self) -> tuple[int, int]:
        """Shard, and slot in it."""
        return divmod(self.slot, SHARD_IMAGES)


def require_catalog(path: Path) -> None:
    """Raise StateError where nothing was ingested."""
    if not path.exists():
        raise StateError(f"{path.name} is missing", step="run `rin-client ingest` first")


def read_images(path: Path, *, split: str | None = None) -> tuple[int, Iterator[CatalogImage]]:
    """The committed slots and the images in canonical order: by pseudonyms, so that it does not depend on the order
    in which files were found or decoded.

    Raises:
        StateError: there is no catalog, or it is damaged.
    """
    require_catalog(path)
    with undamaged(path), contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        slots = db.execute("SELECT value FROM meta WHERE key = 'slots'").fetchone()
        rows = db.execute(
            "SELECT i.patient, i.modality, i.anatomy, i.slot, group_concat(l.label)"
            " FROM images i LEFT JOIN image_labels l ON l.image = i.id WHERE ?1 IS NULL OR i.split = ?1"
            " GROUP BY i.id ORDER BY i.patient, i.instance, i.frame",
            (split,),
        ).fetchall()
    images = (
        CatalogImage(patient, modality, anatomy, slot, tuple(sorted(map(int, labels.split(",")))) if labels else ())
        for patient, modality, anatomy, slot, labels in rows
    )
    return int(slots[0]) if slots else 0, images


def patients_known(path: Path) -> bool:
    """Whether the patients of the catalog's images are people; False where the archive names none and each image
    stands for one of its own.

    Raises:
        StateError: there is no catalog, or it is damaged.
    """
    require_catalog(path)
    with undamaged(path), contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        row = db.execute("SELECT value FROM meta WHERE key = 'patients'").fetchone()
    return row is None or row[0] != PATIENTS_UNKNOWN
