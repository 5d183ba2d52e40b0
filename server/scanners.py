"""The three sites of the phantom consortium: their scanners, the labels they lack, their local label names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# RadImageNet names, sorted by modality; every one of them is held by at least two sites (see `SITES`).
PHANTOM_LABELS: Final[tuple[str, ...]] = (
    "CT_lung_Airspace_opacity",
    "CT_lung_Bronchiectasis",
    "CT_lung_Nodule",
    "CT_lung_interstitial_lung_disease",
    "CT_lung_normal",
    "MR_brain_chronic_infarct",
    "MR_brain_edema",
    "MR_brain_intra",
    "MR_brain_normal",
    "MR_brain_white_matter_changes",
    "US_usabd_aorta",
    "US_usabd_gb",
    "US_usabd_kidney",
    "US_usabd_liver",
)


@dataclass(frozen=True, slots=True)
class Scanner:
    """One scanner; images of two scanners differ as two vendors' do.

    Attributes:
        modality: CT, MR or US (DICOM (0008,0060)).
        manufacturer: the vendor's name in the header.
        noise: standard deviation of the added noise, in units of the display range 0..1.
        contrast: exponent of the grey curve; above 1 darkens the middle.
        field_mm: side of the square field of view in millimetres.
        zoom: size of the anatomy relative to the field of view.
        matrix: rows and columns of the image; the field stays square, so the pixels need not be.
    """

    modality: str
    manufacturer: str
    noise: float
    contrast: float
    field_mm: float
    zoom: float
    matrix: tuple[int, int]

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """Distance between rows and between columns in millimetres, as in PixelSpacing (PS3.3 10.7.1.3)."""
        return self.field_mm / self.matrix[0], self.field_mm / self.matrix[1]


@dataclass(frozen=True, slots=True)
class MappingRow:
    """One row of a site's mapping table; `*` in modality or body part matches all."""

    modality: str
    body_part: str
    local_label: str
    coding_scheme: str
    rin_class: str


@dataclass(frozen=True, slots=True)
class Site:
    """One hospital: what it has, what it calls things.

    Attributes:
        lacks: labels of `PHANTOM_LABELS` that no image of the site shows.
        body_parts: BodyPartExamined by modality (empty: the scanner leaves it out).
        rescale: RescaleSlope and RescaleIntercept of the CT.
        unknown: local labels in the label table that the mapping does not know.
    """

    name: str
    lacks: frozenset[str]
    scanners: dict[str, Scanner]
    body_parts: dict[str, str]
    rescale: tuple[float, float]
    mapping: tuple[MappingRow, ...]
    unknown: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that the site holds, in the order of `PHANTOM_LABELS`."""
        return tuple(label for label in PHANTOM_LABELS if label not in self.lacks)

    def local_names(self, label: str) -> tuple[str, ...]:
        """The site's own names of one RadImageNet label; several local names may mean one label."""
        return tuple(row.local_label for row in self.mapping if row.rin_class == label)


def _rows(scheme: str, table: str) -> tuple[MappingRow, ...]:
    """Mapping rows from lines of `modality body_part local=class local=class ...`; `~` stands for a space."""
    rows = []
    for line in table.strip().splitlines():
        modality, body_part, *pairs = line.split()
        for pair in pairs:
            local, rin_class = pair.rsplit("=", 1)
            rows.append(MappingRow(modality, body_part, local.replace("~", " "), scheme, rin_class))
    return tuple(rows)


_SITE_A: Final = Site(
    name="siteA",
    lacks=frozenset({"CT_lung_Bronchiectasis", "MR_brain_intra"}),
    scanners={
        "CT": Scanner("CT", "SIEMENS", 0.020, 1.0, 360.0, 1.00, (256, 256)),
        "MR": Scanner("MR", "SIEMENS", 0.022, 1.0, 230.0, 1.00, (256, 256)),
        "US": Scanner("US", "GE Healthcare", 0.030, 1.0, 160.0, 1.00, (256, 256)),
    },
    body_parts={"CT": "CHEST", "MR": "BRAIN", "US": "ABDOMEN"},
    rescale=(1.0, -1024.0),
    mapping=_rows(
        "99SITEA",
        """
        CT CHEST consolidation=CT_lung_Airspace_opacity ground~glass=CT_lung_Airspace_opacity
        CT CHEST lung~nodule=CT_lung_Nodule fibrosis=CT_lung_interstitial_lung_disease
        CT CHEST no~finding=CT_lung_normal
        MR BRAIN old~infarct=MR_brain_chronic_infarct edema=MR_brain_edema leukoaraiosis=MR_brain_white_matter_changes
        MR BRAIN no~finding=MR_brain_normal
        US * aorta=US_usabd_aorta gallbladder=US_usabd_gb kidney=US_usabd_kidney liver=US_usabd_liver
        """,
    ),
    unknown=("motion artefact", "see report"),
)

_SITE_B: Final = Site(
    name="siteB",
    lacks=frozenset({"CT_lung_interstitial_lung_disease", "US_usabd_aorta"}),
    scanners={
        "CT": Scanner("CT", "GE MEDICAL SYSTEMS", 0.035, 0.92, 320.0, 1.08, (256, 224)),
        "MR": Scanner("MR", "Philips Medical Systems", 0.032, 1.12, 256.0, 0.92, (256, 192)),
        "US": Scanner("US", "PHILIPS", 0.045, 0.9, 140.0, 1.05, (240, 240)),
    },
    body_parts={"CT": "CHEST", "MR": "HEAD", "US": "ABDOMEN"},
    rescale=(1.0, 0.0),
    mapping=_rows(
        "99SITEB",
        """
        CT CHEST T101=CT_lung_Airspace_opacity T102=CT_lung_Bronchiectasis T103=CT_lung_Nodule
        CT CHEST T104=CT_lung_Nodule T100=CT_lung_normal
        MR HEAD K201=MR_brain_chronic_infarct K202=MR_brain_edema K203=MR_brain_intra
        MR HEAD K204=MR_brain_white_matter_changes K205=MR_brain_white_matter_changes K200=MR_brain_normal
        US ABDOMEN S301=US_usabd_gb S302=US_usabd_kidney S303=US_usabd_liver
        """,
    ),
    unknown=("X999", "T1O3"),
)

_SITE_C: Final = Site(
    name="siteC",
    lacks=frozenset({"MR_brain_white_matter_changes", "US_usabd_kidney"}),
    scanners={
        "CT": Scanner("CT", "TOSHIBA", 0.028, 1.06, 400.0, 0.92, (320, 320)),
        "MR": Scanner("MR", "SIEMENS", 0.040, 0.9, 220.0, 1.05, (224, 256)),
        "US": Scanner("US", "SAMSUNG MEDISON CO., LTD.", 0.038, 1.1, 180.0, 0.95, (256, 256)),
    },
    body_parts={"CT": "CHEST", "MR": "BRAIN", "US": ""},
    rescale=(2.0, -1024.0),
    mapping=_rows(
        "99SITEC",
        """
        CT * Verschattung=CT_lung_Airspace_opacity Bronchiektasen=CT_lung_Bronchiectasis Rundherd=CT_lung_Nodule
        CT * ILD=CT_lung_interstitial_lung_disease Lunge~o.B.=CT_lung_normal
        MR BRAIN Infarkt~alt=MR_brain_chronic_infarct Ödem=MR_brain_edema Tumor=MR_brain_intra
        MR * Schädel~o.B.=MR_brain_normal
        * * Aorta=US_usabd_aorta Gallenblase=US_usabd_gb Leber=US_usabd_liver
        """,
    ),
    unknown=("unklar", "Artefakt"),
)

SITES: Final[dict[str, Site]] = {site.name: site for site in (_SITE_A, _SITE_B, _SITE_C)}
