"""What ingest tells: how far it is, and what became of every file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

from rin.client.ingest.gone import GoneCount

PATIENTS_UNKNOWN: Final = "unknown"  # the catalog's word on an archive that names no patient
PATIENTS_WARNING: Final = (
    "no patient ids exist in this data: each image counts as a patient of its own. One person may stand on both sides"
    " of the split, so validation and test figures come out too high; nothing can be promised per patient, privacy"
    " least of all; and policy.min-patients counts all of it as ONE patient"
)
# What a layout counts besides, in the report's words.
FACTS: Final[dict[str, str]] = {
    "several_labels": "images that carry several labels",
    "several_splits": "images listed under several splits; each stays in one (test before val before train)",
    "missing": "files that the lists name and the archive does not hold",
    "bad_rows": "rows of the lists that name no file of the layout",
    "unused_lists": "published lists beside the archive that were not given with --csv: the split is by hash",
}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far ingest is: `stage` is `scan` (total unknown) or `read`; counts are of files, `accepted` of images."""

    stage: str
    done: int
    total: int
    accepted: int
    refused: int


@dataclass(frozen=True, slots=True)
class IngestReport:
    """Everything that lies below the roots now, whether this run read it or an earlier one.

    `files == accepted_files + sum(refused.values())`: each file has an accepted image or one reason. Frames that were
    refused in a file with another, accepted frame are counted apart, in `refused_images`.

    Args:
        files: files below the roots.
        accepted: images in the catalog from these files.
        accepted_files: files with at least one of them.
        refused: reason to files of which no image was accepted (the commonest reason of its frames).
        refused_images: reason to single frames.
        labels: label name to images.
        unmapped: local label that the mapping does not know, to images; shown, never stored.
        decoded: images that this run added.
        seconds: wall time of this run.
        patients_known: False where the archive does not say whose image a file is.
        facts: counts of the layout's own, see `FACTS`.
        gone: images of the catalog whose file is no longer below the roots.
        pruned: images that this run removed for that reason.
        to_erase: removed images whose pixels are in the cache until nobody trains on it.
        empty_roots: roots without a single file.
    """

    files: int
    accepted: int
    accepted_files: int
    refused: dict[str, int]
    refused_images: dict[str, int]
    labels: dict[str, int]
    unmapped: dict[str, int]
    decoded: int
    seconds: float
    patients_known: bool = True
    facts: dict[str, int] = field(default_factory=dict)
    gone: GoneCount = field(default_factory=GoneCount)
    pruned: int = 0
    to_erase: int = 0
    empty_roots: int = 0

    @property
    def warning(self) -> str | None:
        """What whoever uses these images must know."""
        return None if self.patients_known else PATIENTS_WARNING

    def as_json(self) -> dict[str, Any]:
        """The report as plain values; seconds to the millisecond."""
        plain = asdict(self)
        known = plain.pop("patients_known")
        return plain | {
            "seconds": round(self.seconds, 3),
            "patients": "known" if known else PATIENTS_UNKNOWN,
            "warning": self.warning,
        }
