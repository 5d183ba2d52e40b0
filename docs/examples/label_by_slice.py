"""Write a labels CSV and a mapping CSV for an archive without labels: where in its series a slice lies.

    python docs/examples/label_by_slice.py OUT ARCHIVE [ARCHIVE ...]

The three labels are stand-ins made from header facts. They exercise every part of rin on real pixels and say nothing
clinical: a real site brings a table from its RIS, its PACS or its reports, with the same columns.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

import pydicom
from pydicom.errors import InvalidDicomError

STAND_INS = {"first third": "MR_brain_normal", "middle third": "MR_brain_intra", "last third": "MR_brain_extra"}


def slices(archives: list[Path]) -> dict[str, list[tuple[int, str, int | None]]]:
    """Series to its (position, SOP Instance UID, frame from 1 or None for a single image)."""
    found: dict[str, list[tuple[int, str, int | None]]] = defaultdict(list)
    for path in sorted(path for archive in archives for path in archive.rglob("*") if path.is_file()):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
        except InvalidDicomError:
            continue
        frames = int(header.get("NumberOfFrames") or 1)
        if frames > 1:  # the frames of one object are its slices
            found[header.SOPInstanceUID] = [(frame, header.SOPInstanceUID, frame) for frame in range(1, frames + 1)]
        else:
            found[header.SeriesInstanceUID].append(
                (int(header.get("InstanceNumber") or 0), header.SOPInstanceUID, None)
            )
    return found


def main(out: Path, archives: list[Path]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    names = list(STAND_INS)
    with (out / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["sop_instance_uid", "frame", "label"])
        for series in slices(archives).values():
            last = max(position for position, _, _ in series)
            for position, uid, frame in series:
                third = min(2, 3 * (position - 1) // max(1, last))
                table.writerow([uid, frame or "", names[third]])
    with (out / "mapping.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["modality", "body_part", "local_label", "coding_scheme", "rin_class"])
        table.writerows(["MR", "*", local, "99EXAMPLE", label] for local, label in STAND_INS.items())


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
