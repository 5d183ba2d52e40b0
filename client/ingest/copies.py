"""Files that hold the same pixels, each with a word of its own on labels and split; and the published list of files."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Final

SPLITS: Final = ("train", "val", "test")  # ascending: of several claims on one image the highest holds
UNKNOWN: Final = -1  # the label index of a listed name that the label set does not know
_GONE: Final = 65536  # files forgotten in one query

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS listed (
    path_key BLOB NOT NULL, label INTEGER NOT NULL, split INTEGER NOT NULL, PRIMARY KEY (path_key, label)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS copies (
    path_key BLOB NOT NULL, label INTEGER NOT NULL, split INTEGER NOT NULL,
    image INTEGER NOT NULL REFERENCES images (id) ON DELETE CASCADE, PRIMARY KEY (path_key, label)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS copies_image ON copies (image);
"""


class Copies:
    """Part of a catalog, in its transaction. An archive without instance UIDs needs it: only pixels say what is one
    image there. The image carries the labels of all its files and stands in the highest of their splits, whatever
    order they came in, so that what is tested under one name is trained on under none."""

    def __init__(self, db: sqlite3.Connection) -> None:
        """`db` is the catalog's open database, with `SCHEMA` in it."""
        self._db = db

    def image_with(self, digest: bytes) -> int | None:
        """The image with these pixels."""
        row = self._db.execute("SELECT id FROM images WHERE digest = ?", (digest,)).fetchone()
        return row[0] if row else None

    def image_of(self, path_key: bytes) -> int | None:
        """The image that a file holds, be it its own or another file's."""
        row = self._db.execute("SELECT image FROM copies WHERE path_key = ? LIMIT 1", (path_key,)).fetchone()
        return row[0] if row else None

    def put(self, path_key: bytes, image: int, labels: Sequence[int], split: str) -> None:
        """A file holds `image` and says this about it, instead of what it said before."""
        self._db.execute("DELETE FROM copies WHERE path_key = ?", (path_key,))
        self.put_first(path_key, image, labels, split)
        self._settle(image)

    def put_first(self, path_key: bytes, image: int, labels: Sequence[int], split: str) -> None:
        """The same of a new file and a new image, which has these labels and this split already."""
        rank = SPLITS.index(split)
        rows = [(path_key, label, rank, image) for label in labels]
        self._db.executemany("INSERT INTO copies VALUES (?, ?, ?, ?)", rows)

    def leave(self, path_key: bytes) -> None:
        """Take a file's word back, and hand the image that it owns on to another file that holds it."""
        image = self.image_of(path_key)
        if image is None:
            return
        self._db.execute("DELETE FROM copies WHERE path_key = ?", (path_key,))
        heir = self._db.execute("SELECT min(path_key) FROM copies WHERE image = ?", (image,)).fetchone()[0]
        if heir is None:
            return
        owned = self._db.execute(
            "UPDATE images SET path_key = ? WHERE id = ? AND path_key = ?", (heir, image, path_key)
        )
        if owned.rowcount:
            self._db.execute("UPDATE files SET reason = NULL WHERE path_key = ?", (heir,))
            self._db.execute("DELETE FROM refusals WHERE path_key = ?", (heir,))
        self._settle(image)

    def gone(self, run: int) -> list[bytes]:
        """Some files that run `run` did not see and whose image another file of that run holds; empty if there is none.

        They no longer speak for the image: a file that was taken out of a class takes its label with it.
        """
        here = "SELECT image FROM copies JOIN files USING (path_key) WHERE seen = ?1"
        query = (
            f"SELECT DISTINCT path_key FROM copies JOIN files USING (path_key) WHERE seen <> ?1 AND image IN ({here})"
        )
        return [row[0] for row in self._db.execute(f"{query} LIMIT {_GONE}", (run,))]

    def shared(self) -> tuple[int, int]:
        """Number of images with several labels, and of images that files of different splits hold."""
        query = "SELECT count(*) FROM (SELECT 1 FROM copies GROUP BY image HAVING min({0}) < max({0}))"
        several, across = (self._db.execute(query.format(column)).fetchone()[0] for column in ("label", "split"))
        return several, across

    def clear_list(self) -> None:
        """Forget the list."""
        self._db.execute("DELETE FROM listed")

    def add_to_list(self, rows: Iterable[tuple[bytes, int, int]]) -> None:
        """Add (path key, label index or `UNKNOWN`, index into `SPLITS`); of two splits the higher holds."""
        self._db.executemany(
            "INSERT INTO listed VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET split = max(split, excluded.split)", rows
        )

    def listed(self, path_key: bytes) -> tuple[tuple[int, ...], str] | None:
        """Labels (`UNKNOWN` among them) and split that the list gives a file; None if it does not name it."""
        rows = self._db.execute("SELECT label, split FROM listed WHERE path_key = ? ORDER BY label", (path_key,))
        found = rows.fetchall()
        return (tuple(label for label, _ in found), SPLITS[max(split for _, split in found)]) if found else None

    def missing(self, run: int) -> int:
        """Files that the list names and run `run` did not find."""
        query = "SELECT count(DISTINCT path_key) FROM listed LEFT JOIN files USING (path_key) WHERE seen IS NOT ?"
        return self._db.execute(query, (run,)).fetchone()[0]

    def _settle(self, image: int) -> None:
        rows = self._db.execute("SELECT label, split FROM copies WHERE image = ?", (image,)).fetchall()
        split = SPLITS[max(split for _, split in rows)]
        self._db.execute("UPDATE images SET split = ?1 WHERE id = ?2 AND split <> ?1", (split, image))
        self._db.execute("DELETE FROM image_labels WHERE image = ?", (image,))
        labels = sorted({label for label, _ in rows})
        self._db.executemany("INSERT INTO image_labels VALUES (?, ?)", [(image, label) for label in labels])
