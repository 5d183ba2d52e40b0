"""Why a file or an image was refused: the closed list of reasons that the catalog may hold."""

from __future__ import annotations

from typing import Final

REASONS: Final[dict[str, str]] = {
    "bad-header": "required attributes are missing, contradict each other or cannot be read",
    "bad-rescale": "the rescale slope is zero or not a number",
    "burned-in": "the header says that text is burned into the pixels",
    "codec-crash": "the decoder's process died on this file",
    "codec-error": "the compressed pixels cannot be decoded",
    "codec-mismatch": "the compressed image has another size than the header says",
    "codec-timeout": "decoding took too long and was stopped",
    "constant": "every pixel has the same value",
    "derived": "a projection, reformat or other computed view, not an acquired image",
    "duplicate-instance": "the same instance and frame is already in the catalog",
    "duplicate-pixels": "the same pixels are already in the catalog under another instance",
    "empty": "the file has no bytes",
    "label-conflict": "folder and published list give the image different labels",
    "localizer": "a scout or localizer",
    "no-instance-uid": "the file names no instance, series or study",
    "no-patient-id": "the file names no patient",
    "no-pixels": "the object holds no pixel data",
    "not-dicom": "not a DICOM file",
    "not-png": "not a PNG file",
    "outside-layout": "the path does not name modality, anatomy and class as the layout does",
    "secondary-capture": "a screen capture or scanned document",
    "sop-class": "an object of another kind than an image that rin reads (report, segmentation, dose, ...)",
    "too-large": "the image is larger than the bound",
    "truncated": "the file ends before its pixels do",
    "unlabelled": "the labels file does not name this image",
    "unlisted": "the published list does not name this file",
    "unmapped-label": "the mapping, or the label set, knows none of this image's labels",
    "unreadable": "the file cannot be opened or read",
    "unsupported-pixels": "a pixel format that is not an image for people (1-bit, floating point, ...)",
    "unsupported-syntax": "a transfer syntax without a decoder",
}


class Refused(Exception):
    """A file or an image is refused; `reason` is one of `REASONS`, never free text."""

    def __init__(self, reason: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason}")
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self) -> tuple[type[Refused], tuple[str]]:
        return Refused, (self.reason,)
