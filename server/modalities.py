"""Pictures into the image modules of CT, MR and US instances, with the traps that real headers set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from rin.server.scanners import Site
from rin.server.syntaxes import ENCODERS, Frame, set_pixels

_MARGIN: Final = {"siteA": 0, "siteB": 24, "siteC": 0}  # black columns beside the ultrasound picture
_PADDING_HU: Final = -2000  # outside of the reconstruction circle, where a scanner marks it

# All take the site, the data set to fill, pictures in 0..1 (one, but for ultrasound), the transfer syntax, the number
# of the series among those of its modality (it decides the variants) and a text to burn in (ultrasound only).


def render_ct(site: Site, image: Dataset, pictures: list[Frame], syntax: str, turn: int, text: str) -> None:
    """Signed 16-bit Hounsfield units with the site's rescale and the lung window (PS3.3 C.8.2.1)."""
    slope, intercept = site.rescale
    units = pictures[0] * 1500.0 - 1350.0
    stored = np.clip(np.round((units - intercept) / slope), -32768, 32767).astype(np.int16)
    if turn % 5 in (1, 3):
        padding = round((_PADDING_HU - intercept) / slope)
        stored[~_circle(stored.shape)] = padding
        image.add_new(0x00280120, "SS", padding)  # PixelPaddingValue
    image.PhotometricInterpretation = "MONOCHROME2"
    image.RescaleSlope, image.RescaleIntercept, image.RescaleType = slope, intercept, "HU"
    image.WindowCenter, image.WindowWidth = ([-600, 40], [1500, 400]) if turn % 4 == 0 else (-600, 1500)
    _geometry(site, image, "CT")
    set_pixels(image, stored[None], syntax, bits=16)


def _circle(shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    rows, columns = (np.linspace(-1, 1, n) for n in shape)
    return rows[:, None] ** 2 + columns[None] ** 2 <= 1.06


def render_mr(site: Site, image: Dataset, pictures: list[Frame], syntax: str, turn: int, text: str) -> None:
    """12 bits in 16, arbitrary units, some without a window, some MONOCHROME1 (PS3.3 C.8.3.1, C.7.6.3.1.2)."""
    top = (1800, 3600, 2600)[turn % 3]
    stored = np.round(pictures[0] * top).astype(np.uint16)
    centre = top / 2
    image.PhotometricInterpretation = "MONOCHROME2"
    if turn % 7 == 3:
        image.PhotometricInterpretation = "MONOCHROME1"
        stored, centre = np.uint16(4095) - stored, 4095 - centre
    if turn % 5 != 2:
        image.WindowCenter, image.WindowWidth = centre, top
    _geometry(site, image, "MR")
    set_pixels(image, stored[None], syntax, bits=12)


def _geometry(site: Site, image: Dataset, modality: str) -> None:
    rows_mm, columns_mm = site.scanners[modality].pixel_mm
    image.PixelSpacing = [f"{rows_mm:.6f}", f"{columns_mm:.6f}"]
    image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    image.SliceThickness = 5


def render_us(site: Site, image: Dataset, pictures: list[Frame], syntax: str, turn: int, text: str) -> None:
    """8-bit colour, JPEG or uncompressed, with the grey bar of the console (PS3.3 C.8.5.6)."""
    margin = _MARGIN[site.name]
    screens = []
    for picture in pictures:
        screen = cv2.copyMakeBorder(np.round(picture * 255).astype(np.uint8), 0, 0, margin, margin, cv2.BORDER_CONSTANT)
        screen[20:84, 4:10] = np.linspace(255, 0, 64).astype(np.uint8)[:, None]
        if text:
            cv2.putText(screen, text, (14, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.4, 255, 1, cv2.LINE_AA)
            image.BurnedInAnnotation = "YES"
        screens.append(np.stack([screen, screen, (screen * 0.94).astype(np.uint8)], axis=-1))
    set_pixels(image, np.stack(screens), syntax, bits=8, planar=syntax not in ENCODERS and turn % 8 == 5)


Render = Callable[[Site, Dataset, list[Frame], str, int, str], None]
RENDER: Final[dict[str, Render]] = {"CT": render_ct, "MR": render_mr, "US": render_us}
