"""Writes one phantom hospital: a DICOM archive with its label table, mapping table, damage and PHI canaries."""

from __future__ import annotations

import csv
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    ComprehensiveSRStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
)

from rin.common.errors import StateError
from rin.common.files import write_json
from rin.server.damage import DAMAGE
from rin.server.modalities import RENDER, render_ct
from rin.server.phantom import draw
from rin.server.scanners import SITES, Site
from rin.server.syntaxes import COLOUR_SYNTAXES, ENCODERS, GREY_SYNTAXES, set_pixels

DAMAGED_SHARE: Final = 0.025
_UID_ROOT: Final = "1.2.826.0.1.3680043.10.9753"
_SOP_CLASSES: Final = {"CT": CTImageStorage, "MR": MRImageStorage, "US": UltrasoundImageStorage}

Rng = np.random.Generator


@dataclass(frozen=True, slots=True)
class ArchiveFacts:
    """What was written.

    Attributes:
        files: all files under `dicom/`, damaged ones and extras included.
        frames: catalog images in the undamaged image files that the label table names with a mapped label.
        damaged: number of damaged files by kind (`rin.server.damage.DAMAGE`).
        extras: number of files that are no key images, by kind (localizer, structured-report, secondary-capture).
        syntaxes: number of undamaged image files by transfer syntax UID.
        canaries: the file that lists the text canaries, outside of the archive.
    """

    site: str
    root: Path
    patients: int
    files: int
    frames: int
    damaged: dict[str, int]
    extras: dict[str, int]
    syntaxes: dict[str, int]
    canaries: Path


@dataclass(frozen=True, slots=True)
class _Patient:
    token: str
    name: str
    birth: str
    sex: str
    age: str


@dataclass(slots=True)
class _File:
    """One image file, as far as damage and the tables need it."""

    path: Path
    uid: str
    syntax: str
    labels: list[list[str]]  # local names by frame
    plain: bool  # one frame, a mapped label, no burned-in text: only damage keeps it out of a catalog


@dataclass(slots=True)
class _Archive:
    """The archive while it is written."""

    site: Site
    folder: Path
    uid_root: str
    files: list[_File] = field(default_factory=list)
    extras: Counter[str] = field(default_factory=Counter)
    canaries: set[str] = field(default_factory=set)
    dates: set[str] = field(default_factory=set)
    series: Counter[str] = field(default_factory=Counter)
    burned_in: str = ""
    serial: int = 0

    def canary(self, text: str) -> str:
        self.canaries.add(text)
        return text


def write_archive(
    site: str, out: Path, *, seed: int, patients: int = 200, progress: Callable[[int, int], None] | None = None
) -> ArchiveFacts:
    """Write `out/<site>/dicom`, `labels.csv` and `mapping.csv`, and beside it `out/<site>.canaries.json`.

    The bytes depend on `site`, `seed` and `patients` only. The site's folder appears when it is complete.

    Args:
        site: a key of `SITES`.
        progress: called with (patients written, patients) after each one.

    Raises:
        KeyError: an unknown site.
        StateError: `out/<site>` exists already.
    """
    home, part, canaries = out / site, out / f".{site}.part", out / f"{site}.canaries.json"
    if home.exists():
        raise StateError(f"{home} exists already", step="Choose another directory or remove this one.")
    if part.exists():
        shutil.rmtree(part)  # what an interrupted run of this function left
    key = zlib.crc32(site.encode())
    archive = _Archive(SITES[site], part / "dicom", f"{_UID_ROOT}.{key % 1000}.{seed}")
    for number, token in enumerate(_tokens(np.random.default_rng([seed, key]), patients)):
        rng = np.random.default_rng([seed, key, number])
        _write_patient(archive, rng, number, token, extras=number % 40 == 7 or number == patients - 1)
        if progress is not None:
            progress(number + 1, patients)
    damaged = _damage(archive, np.random.default_rng([seed, key, patients, 1]))
    _write_tables(archive, part)
    write_json(canaries, _canary_record(archive, damaged, part))
    part.rename(home)
    good = [file for file in archive.files if file.path not in damaged]
    known = {row.local_label for row in archive.site.mapping}
    return ArchiveFacts(
        site,
        home,
        patients,
        files=len(archive.files) + archive.extras.total(),
        frames=sum(any(name in known for name in frame) for file in good for frame in file.labels),
        damaged=dict(Counter(damaged.values())),
        extras=dict(archive.extras),
        syntaxes=dict(Counter(file.syntax for file in good)),
        canaries=canaries,
    )


def _tokens(rng: Rng, count: int) -> list[str]:
    """Distinct words of seven letters: what makes a patient's canaries unique."""
    tokens: dict[str, None] = {}
    while len(tokens) < count:
        tokens["".join(rng.choice(list("BCDFGHJKLMNPQRSTVWXZ"), 7))] = None
    return list(tokens)


def _write_patient(archive: _Archive, rng: Rng, number: int, token: str, *, extras: bool) -> None:
    """One patient: 1-20 images in one or two studies, a modality each; the label is correlated within the patient."""
    patient = _Patient(
        token,
        archive.canary(f"CANARY^{'ZOË' if archive.site.name == 'siteC' else 'ZOE'}^{token}"),
        f"18{rng.integers(60, 99)}{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}",
        str(rng.choice(["F", "M"])),
        f"{rng.integers(18, 90):03d}Y",
    )
    archive.dates.add(patient.birth)
    archive.canary(f"CANARY-ID-{token}")
    images = min(20, int(rng.geometric(0.118)))
    modalities = list(rng.permutation(["CT", "MR", "US"]))
    second = images // 3 if images >= 4 and rng.random() < 0.35 else 0
    counts = [images - second, second] if second else [images]
    for study, count in enumerate(counts):
        _write_study(archive, rng, patient, (number + 1, study + 1), modalities[study], count)
    if extras:
        _write_extras(archive, rng, patient, number + 1)


def _write_study(
    archive: _Archive, rng: Rng, patient: _Patient, where: tuple[int, int], modality: str, count: int
) -> None:
    """`count` images of one modality, in series of at most seven."""
    labels = [label for label in archive.site.labels if label.startswith(modality)]
    primary = str(rng.choice(labels))
    header = _study_header(archive, rng, patient, where)
    for series, start in enumerate(range(0, count, 7), start=1):
        findings = []
        for _ in range(min(7, count - start)):
            label = primary if rng.random() < 0.55 else str(rng.choice(labels))
            others = [other for other in labels if other != label and not other.endswith("normal")]
            two = rng.random() < 0.025 and not label.endswith("normal")
            findings.append((label, str(rng.choice(others)) if two else None))
        _write_series(archive, rng, patient, header, (*where, series), modality, findings)


def _study_header(archive: _Archive, rng: Rng, patient: _Patient, where: tuple[int, int]) -> Dataset:
    """The header that all images of a study share: full of what must never leave a hospital."""
    token, canary = patient.token, archive.canary
    header = Dataset()
    header.SpecificCharacterSet = "ISO_IR 192" if archive.site.name == "siteC" else "ISO_IR 100"
    header.PatientName = patient.name
    header.PatientID = f"CANARY-ID-{token}"
    header.PatientBirthDate, header.PatientSex, header.PatientAge = patient.birth, patient.sex, patient.age
    header.OtherPatientNames = canary(f"CANARY^MAIDEN^{token}")
    header.PatientAddress = canary(f"CANARY street {token}")
    header.PatientComments = canary(f"CANARY comment {token}")
    header.StudyInstanceUID = f"{archive.uid_root}.{where[0]}.{where[1]}"
    header.StudyDate = f"18{rng.integers(60, 99)}{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}"
    archive.dates.add(header.StudyDate)
    header.StudyTime = f"{rng.integers(7, 19):02d}{rng.integers(0, 60):02d}00"
    header.StudyID = canary(f"CANARYS{token}")
    header.AccessionNumber = canary(f"CANARY{token}{where[1]}")
    header.StudyDescription = canary(f"CANARY study of {token}")
    header.ReferringPhysicianName = canary(f"CANARY^REFERRER^{token}")
    header.InstitutionName = canary(f"CANARY hospital {archive.site.name}")
    header.DeviceSerialNumber = canary(f"CANARY-SN-{archive.site.name}")
    block = header.private_block(0x0099, "CANARY PRIVATE", create=True)
    block.add_new(0x01, "LO", canary(f"CANARY private {token}"))
    block.add_new(0x02, "UN", canary(f"CANARY unknown {token} ").encode())
    return header


def _write_series(
    archive: _Archive,
    rng: Rng,
    patient: _Patient,
    study: Dataset,
    where: tuple[int, int, int],
    modality: str,
    findings: list[tuple[str, str | None]],
) -> None:
    """One series in one transfer syntax; ultrasound series are single images or one multi-frame cine in turn."""
    turn = archive.series[modality]
    archive.series[modality] += 1
    header = _series_header(archive, study, where, modality)
    syntaxes = COLOUR_SYNTAXES if modality == "US" else GREY_SYNTAXES
    syntax = syntaxes[turn % len(syntaxes)]
    size = 6 if modality == "US" and turn % 3 == 1 else 1
    folder = _folder(archive, patient, header, where)
    for number, start in enumerate(range(0, len(findings), size), start=1):
        shown = findings[start : start + size]
        scanner = archive.site.scanners[modality]
        pictures = [draw(label, rng, scanner, also=also) for label, also in shown]
        image = _copy(header)
        uid = f"{header.SeriesInstanceUID}.{number}"
        burn = modality == "US" and not archive.burned_in and len(shown) == 1
        text = archive.canary(f"CANARY BURN {patient.token}") if burn else ""
        if burn:
            archive.burned_in = uid
        RENDER[modality](archive.site, image, pictures, syntax, turn, text)
        image.SOPClassUID = UltrasoundMultiFrameImageStorage if len(shown) > 1 else _SOP_CLASSES[modality]
        image.ImageComments = archive.canary(f"CANARY image {patient.token} {where[1]}.{where[2]}.{number}")
        path = _save(archive, folder, image, uid, number, syntax)
        names = [_local_names(archive.site, rng, pair) for pair in shown]
        known = bool(names[0]) and names[0][0] not in archive.site.unknown
        archive.files.append(_File(path, uid, syntax, names, plain=len(shown) == 1 and not burn and known))


def _series_header(archive: _Archive, study: Dataset, where: tuple[int, int, int], modality: str) -> Dataset:
    header = _copy(study)
    header.Modality = modality
    header.Manufacturer = archive.site.scanners[modality].manufacturer
    header.SeriesInstanceUID = f"{study.StudyInstanceUID}.{where[2]}"
    header.SeriesNumber = where[2]
    header.SeriesDescription = archive.canary(f"CANARY series {where[2]}")
    header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"] if modality == "CT" else ["ORIGINAL", "PRIMARY", "OTHER"]
    if archive.site.body_parts[modality]:
        header.BodyPartExamined = archive.site.body_parts[modality]
    return header


def _copy(header: Dataset) -> Dataset:
    """A data set with the same elements; elements are replaced later, never changed in place."""
    copy = Dataset()
    copy.update(header)
    return copy


def _folder(archive: _Archive, patient: _Patient, header: Dataset, where: tuple[int, ...]) -> Path:
    folder = archive.folder / archive.canary(f"CANARY_{patient.token}") / f"ST{where[1]}_{header.StudyDate}"
    folder = folder / f"{header.Modality}{where[2]:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _save(archive: _Archive, folder: Path, image: Dataset, uid: str, number: int, syntax: str) -> Path:
    """Write one instance; some file names carry the patient, some have no suffix."""
    archive.serial += 1
    image.SOPInstanceUID, image.InstanceNumber = uid, number
    names = (
        f"IM{number:04d}.dcm",
        f"{archive.canary(f'CANARY-FILE-{image.PatientID[10:]}')}-{number:04d}.dcm",
        f"I{number:06d}",
    )
    path = folder / names[archive.serial % 3]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = image.SOPClassUID, UID(uid)
    meta.TransferSyntaxUID = UID(syntax)
    image.file_meta = meta
    dcmwrite(path, image, enforce_file_format=True)
    return path


def _local_names(site: Site, rng: Rng, pair: tuple[str, str | None]) -> list[str]:
    """What the site's table says of one frame: mostly one known name, at times two, an unknown one, or nothing."""
    names = [str(rng.choice(site.local_names(label))) for label in pair if label is not None]
    chance = rng.random()
    if chance < 0.015:
        return []
    if chance < 0.025:
        return [str(rng.choice(site.unknown))]
    return [*names, str(rng.choice(site.unknown))] if chance < 0.035 else names


def _write_extras(archive: _Archive, rng: Rng, patient: _Patient, number: int) -> None:
    """What lies in every archive and is no key image: a localizer, a structured report, a secondary capture."""
    study = _study_header(archive, rng, patient, (number, 9))
    localizer = _series_header(archive, study, (number, 9, 1), "CT")
    localizer.SOPClassUID, localizer.ImageType = CTImageStorage, ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    render_ct(archive.site, localizer, [draw(archive.site.labels[0], rng, archive.site.scanners["CT"])], "", 0, "")
    report = _series_header(archive, study, (number, 9, 2), "CT")
    report.SOPClassUID, report.Modality = ComprehensiveSRStorage, "SR"
    item = Dataset()
    item.ValueType, item.RelationshipType = "TEXT", "CONTAINS"
    item.TextValue = archive.canary(f"CANARY report {patient.token}")
    report.ValueType, report.CompletionFlag, report.VerificationFlag = "CONTAINER", "COMPLETE", "UNVERIFIED"
    report.ContentSequence = [item]
    capture = _series_header(archive, study, (number, 9, 3), "US")
    capture.SOPClassUID, capture.Modality, capture.ImageType = (
        SecondaryCaptureImageStorage,
        "OT",
        ["DERIVED", "SECONDARY"],
    )
    page = np.zeros((1, 256, 256, 3), np.uint8)
    cv2.putText(
        page[0],
        archive.canary(f"CANARY PAGE {patient.token}"),
        (8, 40),
        cv2.FONT_HERSHEY_SIMPLEX,
        0.45,
        (255, 255, 255),
    )
    set_pixels(capture, page, ExplicitVRLittleEndian, bits=8)
    kinds = {"localizer": localizer, "structured-report": report, "secondary-capture": capture}
    for series, (kind, image) in enumerate(kinds.items(), start=1):
        folder = _folder(archive, patient, image, (number, 9, series))
        _save(archive, folder, image, f"{image.SeriesInstanceUID}.1", 1, ExplicitVRLittleEndian)
        archive.extras[kind] += 1


def _damage(archive: _Archive, rng: Rng) -> dict[Path, str]:
    """Damage `DAMAGED_SHARE` of all files in place, the kinds in turn; path to kind."""
    total = round(DAMAGED_SHARE * (len(archive.files) + archive.extras.total()))
    candidates = [archive.files[i] for i in rng.permutation(len(archive.files)) if archive.files[i].plain]
    damaged: dict[Path, str] = {}
    for turn in range(total):
        kind = list(DAMAGE)[turn % len(DAMAGE)]
        spoil, wanted = DAMAGE[kind]
        for place, file in enumerate(candidates):
            if wanted == "any" or (file.syntax in ENCODERS) == (wanted == "encapsulated"):
                del candidates[place]
                file.path.write_bytes(spoil(file.path.read_bytes(), rng))
                damaged[file.path] = kind
                break
    return damaged


def _write_tables(archive: _Archive, part: Path) -> None:
    """labels.csv (frames count from 1, as in PS3.3 C.7.6.6) and mapping.csv."""
    with (part / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["sop_instance_uid", "frame", "label"])
        for image in archive.files:
            for frame, names in enumerate(image.labels, start=1):
                table.writerows([image.uid, frame, name] for name in names)
    with (part / "mapping.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["modality", "body_part", "local_label", "coding_scheme", "rin_class"])
        table.writerows(
            [row.modality, row.body_part, row.local_label, row.coding_scheme, row.rin_class]
            for row in archive.site.mapping
        )


def _canary_record(archive: _Archive, damaged: dict[Path, str], part: Path) -> dict[str, Any]:
    """What a test searches for, and what it must find accounted for."""
    return {
        "marker": "CANARY",  # in every text canary
        "canaries": sorted(archive.canaries),
        "dates": sorted(archive.dates),  # birth and study dates; eight digits, so search in text, not in weights
        "uid_root": archive.uid_root,
        "burned_in": archive.burned_in,  # SOP Instance UID of the image with burned-in text
        "damaged": dict(Counter(damaged.values())),
        "damaged_files": {str(path.relative_to(part)): kind for path, kind in sorted(damaged.items())},
        "extras": dict(archive.extras),
    }
