"""Which files are images to learn from, and the reason for each that is not."""

from __future__ import annotations

import pytest

from rin.client.ingest.header import EXPLICIT_LE, TAGS, Header
from rin.client.ingest.reasons import REASONS, Refused
from rin.client.ingest.selection import anatomy, identity, select

MR = "1.2.840.10008.5.1.4.1.1.4"
GOOD = {
    "SOPClassUID": MR,
    "SOPInstanceUID": "1.2.3",
    "StudyInstanceUID": "1.2.4",
    "SeriesInstanceUID": "1.2.5",
    "PatientID": "P1",
    "ImageType": "ORIGINAL\\PRIMARY\\OTHER",
}


def header(**changes: str) -> Header:
    values = {key: value for key, value in (GOOD | changes).items() if value}
    return Header({TAGS[key]: value.encode() for key, value in values.items()}, EXPLICIT_LE, pixel_offset=2000)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "secondary-capture"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.4"}, "secondary-capture"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"}, "sop-class"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4"}, "sop-class"),
        ({"SOPClassUID": "1.2.840.10008.1.3.10"}, "sop-class"),
        ({"SOPClassUID": ""}, "sop-class"),
        ({"ImageType": "ORIGINAL\\PRIMARY\\LOCALIZER"}, "localizer"),
        ({"SeriesDescription": "3-plane Scout"}, "localizer"),
        ({"ImageType": "DERIVED\\SECONDARY\\PROJECTION IMAGE"}, "derived"),
        ({"ImageType": "DERIVED\\SECONDARY\\MPR"}, "derived"),
        ({"SeriesDescription": "Dose Report"}, "derived"),
        ({"BurnedInAnnotation": "YES"}, "burned-in"),
    ],
)
def test_refused(changes: dict[str, str], reason: str) -> None:
    with pytest.raises(Refused) as refused:
        select(header(**changes))
    assert refused.value.reason == reason


def test_accepted_with_its_modality() -> None:
    assert select(header()) == "MR"
    assert select(header(SOPClassUID="1.2.840.10008.5.1.4.1.1.3.1")) == "US"
    # De-identified and lossy compressed images are DERIVED too (PS3.3 C.7.6.1.1.2), and mosaics are acquired.
    assert select(header(ImageType="DERIVED\\SECONDARY")) == "MR"
    assert select(header(ImageType="ORIGINAL\\PRIMARY\\M\\ND\\MOSAIC")) == "MR"


def test_without_pixels_or_decoder() -> None:
    elements = header().elements
    with pytest.raises(Refused, match="no-pixels"):
        select(Header(elements, EXPLICIT_LE))
    with pytest.raises(Refused, match="unsupported-syntax"):
        select(Header(elements, "1.2.840.10008.1.2.4.100", pixel_offset=2000))


def test_identity_needs_a_patient_and_three_uids() -> None:
    assert identity(header(PatientID=" P1 ")) == identity(header(PatientID="P1"))
    assert identity(header(IssuerOfPatientID="H1")) != identity(header())
    for changes, reason in (
        ({"PatientID": ""}, "no-patient-id"),
        ({"PatientID": "  "}, "no-patient-id"),
        ({"SOPInstanceUID": ""}, "no-instance-uid"),
        ({"StudyInstanceUID": "n/a"}, "no-instance-uid"),
    ):
        with pytest.raises(Refused, match=reason):
            identity(header(**changes))


def test_anatomies_are_an_enum_of_the_label_set() -> None:
    assert anatomy(header(BodyPartExamined="Abdomen"), "CT") == "abd"
    assert anatomy(header(BodyPartExamined="ABDOMEN"), "MR") == "mriabd"
    assert anatomy(header(BodyPartExamined="ABDOMEN"), "US") == "usabd"
    assert anatomy(header(BodyPartExamined="SMITH^JOHN"), "MR") == "other"
    assert anatomy(header(), "MR") == "unknown"


def test_reasons_are_a_closed_list() -> None:
    assert all(sentence and not sentence.endswith(".") for sentence in REASONS.values())
    with pytest.raises(ValueError, match="unknown reason"):
        Refused("CANARY^NAME")
