"""What ingest tells: how far it is, and what became of every file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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

    def as_json(self) -> dict[str, Any]:
        """The report as plain values; seconds to the millisecond."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}
