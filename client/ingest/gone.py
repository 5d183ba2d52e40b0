"""Images whose file is no longer in the archive: counted in every run, removed only when a person asks for it."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Final

_FILES: Final = 65536  # files forgotten in one query
NEXT: Final = (
    "they are still trained on: mount what is missing, or remove them from catalog and cache with"
    " `rin-client ingest --prune`"
)


@dataclass(frozen=True, slots=True)
class GoneCount:
    """What is in the catalog although its file is gone.

    Args:
        images: how many; each of them is still trained on.
        patients: of how many patients; None where the archive names none.
        earlier_labels: how many of them carry labels by an earlier labels file, mapping or list than this run's, so
            that a label which was withdrawn since then still counts.
    """

    images: int = 0
    patients: int | None = 0
    earlier_labels: int = 0

    def as_text(self) -> str:
        """One line for a person; empty if nothing is gone."""
        if not self.images:
            return ""
        of = "" if self.patients is None else f" of {self.patients} patients"
        labels = f", {self.earlier_labels} with labels that this run's files may have withdrawn"
        return f"{self.images} images{of} have no file any more{labels if self.earlier_labels else ''}; {NEXT}"


class Gone:
    """Part of a catalog, in its transaction. Run `run` did not see a file that was last seen before it: it may have
    been deleted, have rolled over, or lie on a disk that is not mounted; nobody but a person can tell."""

    def __init__(self, db: sqlite3.Connection) -> None:
        """`db` is the catalog's open database."""
        self._db = db

    def count(self, run: int, labelling: bytes, *, patients_known: bool) -> GoneCount:
        """What run `run`, which has seen every file, with the labels of digest `labelling`, did not find."""
        here = "FROM images JOIN files USING (path_key)"
        images, patients = self._db.execute(
            f"SELECT count(*), count(DISTINCT patient) {here} WHERE seen < ?", (run,)
        ).fetchone()
        (earlier,) = self._db.execute(
            f"SELECT count(DISTINCT id) {here} JOIN image_labels ON image = id WHERE seen < ? AND labelling <> ?",
            (run, labelling),
        ).fetchone()
        return GoneCount(images, patients if patients_known else None, earlier)

    def files(self, run: int) -> list[bytes]:
        """Path keys of some files that run `run` did not see; empty if there is none."""
        query = f"SELECT path_key FROM files WHERE seen < ? LIMIT {_FILES}"
        return [row[0] for row in self._db.execute(query, (run,))]

    def images(self) -> int:
        """Images of the catalog, whether their files are there or not."""
        return self._db.execute("SELECT count(*) FROM images").fetchone()[0]

    def since(self, run: int, before: int) -> bool:
        """Whether a file with an image went between run `before` and run `run`."""
        query = "SELECT 1 FROM files WHERE seen >= ? AND seen < ? AND reason IS NULL LIMIT 1"
        return self._db.execute(query, (before, run)).fetchone() is not None

    def look_again(self, *reasons: str) -> None:
        """Let files that were refused with one of these be read once more: what they repeated may be gone.

        Where only pixels say what is one image, such a file has taken it over already.
        """
        marks, others = ", ".join("?" * len(reasons)), "path_key NOT IN (SELECT path_key FROM copies)"
        self._db.execute(f"UPDATE files SET stamp = x'' WHERE reason IN ({marks}) AND {others}", reasons)
