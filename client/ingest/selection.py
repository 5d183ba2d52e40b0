"""Which files are images to learn from: by SOP class, image type and identifiers, each refusal with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rin.client.ingest.header import UID, Header
from rin.client.ingest.pixels import readable
from rin.client.ingest.reasons import Refused

_STORAGE: Final = "1.2.840.10008.5.1.4.1.1."

# SOP class UID below `_STORAGE` (PS3.4 B.5) to the modality that rin records.
IMAGE_CLASSES: Final[dict[str, str]] = {
    "1": "CR",
    "1.1": "DX",
    "1.2": "MG",
    "2": "CT",
    "2.1": "CT",  # enhanced
    "2.2": "CT",  # legacy converted enhanced
    "3": "US",  # multi-frame, retired
    "3.1": "US",  # multi-frame
    "4": "MR",
    "4.1": "MR",  # enhanced
    "4.3": "MR",  # enhanced colour
    "4.4": "MR",  # legacy converted enhanced
    "6": "US",  # retired
    "6.1": "US",
    "12.1": "XA",
    "12.1.1": "XA",  # enhanced
    "12.2": "RF",
    "20": "NM",
    "128": "PT",
    "130": "PT",  # enhanced
}
_SECONDARY_CAPTURE: Final = "7"

# ImageType value 3 and later (PS3.3 C.7.6.1.1.2). Value 1 DERIVED alone refuses nothing: lossy compression and
# de-identification set it too, and key images of both kinds are what the labels are about.
_LOCALIZER: Final = frozenset({"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW"})
_DERIVED: Final = frozenset({"PROJECTION IMAGE", "MIP", "MINIP", "MPR", "CSA MPR", "CURVED", "SCREEN SAVE"}) | {
    "VRT",
    "VOLREN",
    "SSD",
    "3D RENDERED",
    "DOSE",
    "DOSE_INFO",
}
_LOCALIZER_WORDS: Final = ("LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW")
_DERIVED_WORDS: Final = ("DOSE REPORT", "DOSE INFO", "PATIENT PROTOCOL")

# BodyPartExamined (PS3.16 annex L) to the anatomies of the label set; the catalog holds no free text.
ANATOMIES: Final[dict[str, str]] = {
    "ABDOMEN": "abd",
    "ABDOMENPELVIS": "abd",
    "PELVIS": "abd",
    "LIVER": "abd",
    "KIDNEY": "abd",
    "CHEST": "lung",
    "LUNG": "lung",
    "THORAX": "lung",
    "ANKLE": "af",
    "FOOT": "af",
    "BRAIN": "brain",
    "HEAD": "brain",
    "SKULL": "brain",
    "HIP": "hip",
    "KNEE": "knee",
    "SHOULDER": "shoulder",
    "SPINE": "spine",
    "CSPINE": "spine",
    "TSPINE": "spine",
    "LSPINE": "spine",
    "SSPINE": "spine",
    "THYROID": "usthyroid",
    "NECK": "usthyroid",
}
# The label set names an anatomy differently by modality.
_BY_MODALITY: Final[dict[tuple[str, str], str]] = {("MR", "abd"): "mriabd", ("US", "abd"): "usabd"}


@dataclass(frozen=True, slots=True)
class Identity:
    """The identifiers of one instance, in clear: they live in memory only, until they are made pseudonyms."""

    patient: bytes
    issuer: bytes
    study: bytes
    series: bytes
    instance: bytes


def select(header: Header) -> str:
    """Check that the file is an acquired image with identifiers.

    Returns:
        The modality.

    Raises:
        Refused: the reason why not.
    """
    sop_class = header.text("SOPClassUID")
    kind = sop_class.removeprefix(_STORAGE) if sop_class.startswith(_STORAGE) else ""
    if kind == _SECONDARY_CAPTURE or kind.startswith(_SECONDARY_CAPTURE + "."):
        raise Refused("secondary-capture")
    modality = IMAGE_CLASSES.get(kind)
    if modality is None:
        raise Refused("sop-class")
    _check_type(header)
    if header.text("BurnedInAnnotation") == "YES":
        raise Refused("burned-in")
    if not readable(header.syntax):
        raise Refused("unsupported-syntax")
    if header.complete and header.pixel_offset is None and not header.from_dataset:
        raise Refused("no-pixels")
    return modality


def _check_type(header: Header) -> None:
    kinds = set(header.texts("ImageType")[2:])
    description = header.text("SeriesDescription")
    if kinds & _LOCALIZER or any(word in description for word in _LOCALIZER_WORDS):
        raise Refused("localizer")
    if kinds & _DERIVED or any(word in description for word in _DERIVED_WORDS):
        raise Refused("derived")


def identity(header: Header) -> Identity:
    """The identifiers of the instance.

    A file without a patient id is refused: the patient is the unit of privacy and of the split, and neither a common
    pseudonym (which merges strangers) nor one by study (which splits a person in two and halves the privacy that was
    promised) keeps that.

    Raises:
        Refused: `no-patient-id` or `no-instance-uid`.
    """
    patient = header.raw("PatientID")
    if not patient:
        raise Refused("no-patient-id")
    study, series, instance = (header.raw(k) for k in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"))
    if not all(UID.fullmatch(uid.decode("latin-1")) for uid in (study, series, instance)):
        raise Refused("no-instance-uid")
    return Identity(patient, header.raw("IssuerOfPatientID"), study, series, instance)


def anatomy(header: Header, modality: str) -> str:
    """The anatomy by BodyPartExamined, in the label set's names; `other` or `unknown` beyond them."""
    part = header.text("BodyPartExamined")
    if not part:
        return "unknown"
    name = ANATOMIES.get(part.replace(" ", ""), "other")
    return _BY_MODALITY.get((modality, name), name)
