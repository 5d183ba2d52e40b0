"""Stored values to the 256x256 uint8 picture that a reader would see: padding, rescale, window, polarity, geometry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from rin.client.ingest.header import Header
from rin.client.ingest.reasons import Refused

SIDE: Final = 256  # pixels of the square that the cache holds
PERCENTILES: Final = (0.5, 99.5)
_FINE: Final = 512  # stored units below which whole numbers are too coarse to average in

# (centre, width) in HU where a CT names no usable window: the two reading windows of RadImageNet's two CT regions.
CT_LUNG: Final = (-600.0, 1500.0)
CT_SOFT: Final = (40.0, 400.0)

Function = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]
_SMALLEST_WIDTH: Final[dict[str, float]] = {"LINEAR": 1.0, "LINEAR_EXACT": 0.0, "SIGMOID": 0.0}  # PS3.3 C.11.2.1


@dataclass(frozen=True, slots=True)
class Window:
    """A VOI window in rescaled values (PS3.3 C.11.2.1.2, C.11.2.1.3)."""

    centre: float
    width: float
    function: Function = "LINEAR"

    def limits(self) -> tuple[float, float]:
        """The values that become black and white; LINEAR takes half a unit off on each side."""
        if self.function == "LINEAR":
            half = (self.width - 1) / 2
            return self.centre - 0.5 - half, self.centre - 0.5 + half
        return self.centre - self.width / 2, self.centre + self.width / 2


@dataclass(frozen=True, slots=True)
class Lut:
    """A look-up table (PS3.3 C.11.1.1): `first` is the input value of entry 0."""

    first: int
    table: NDArray[np.float32]

    def apply(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Values outside the table take its first or last entry."""
        at = np.clip(np.rint(values).astype(np.int64) - self.first, 0, len(self.table) - 1)
        return self.table[at]


@dataclass(frozen=True, slots=True)
class Grey:
    """How the stored values of one frame become grey."""

    modality: str
    body_part: str
    slope: float = 1.0
    intercept: float = 0.0
    window: Window | None = None
    padding: tuple[int, int] | None = None
    inverted: bool = False
    aspect: float = 1.0  # height of a pixel over its width
    modality_lut: Lut | None = None
    voi_lut: Lut | None = None


def grey_of(header: Header, *, modality: str, signed: bool) -> Grey:
    """The grey values of a frame by the top level of its header.

    Raises:
        Refused: `bad-rescale`.
    """
    photometric = header.text("PhotometricInterpretation")
    spacing = header.numbers("PixelSpacing") or header.numbers("ImagerPixelSpacing")
    return Grey(
        modality=modality,
        body_part=header.text("BodyPartExamined"),
        slope=rescale(header.number("RescaleSlope"), 1.0),
        intercept=rescale(header.number("RescaleIntercept"), 0.0),
        window=window_of(header.numbers("WindowCenter"), header.numbers("WindowWidth"), header.text("VOILUTFunction")),
        padding=_padding(header, signed=signed),
        inverted=photometric == "MONOCHROME1",
        aspect=aspect_of(header.numbers("PixelAspectRatio")) or aspect_of(spacing) or 1.0,
    )


def rescale(value: float | None, absent: float) -> float:
    """Slope and intercept count separately: one may stand without the other (PS3.3 C.11.1.1.2).

    Raises:
        Refused: `bad-rescale` for NaN, or for a slope (absent = 1) of zero.
    """
    if value is None:
        return absent
    if math.isnan(value) or (absent == 1.0 and value == 0):
        raise Refused("bad-rescale")
    return value


def window_of(centres: list[float], widths: list[float], function: str) -> Window | None:
    """The first window if it can be used; a width below 1 (LINEAR) or not above 0 counts as absent."""
    if not centres or not widths or math.isnan(centres[0]) or math.isnan(widths[0]):
        return None
    kind: Function = function if function in ("LINEAR_EXACT", "SIGMOID") else "LINEAR"
    smallest = _SMALLEST_WIDTH[kind]
    usable = widths[0] >= smallest if kind == "LINEAR" else widths[0] > smallest
    return Window(centres[0], widths[0], kind) if usable else None


def aspect_of(vertical_horizontal: list[float]) -> float | None:
    """Height over width of a pixel from PixelSpacing (row, column) or PixelAspectRatio (vertical, horizontal).

    Ratios within 0.1 % of 1 are rounding; ratios beyond 1:16 are not believed.
    """
    if len(vertical_horizontal) < 2 or not all(value > 0 for value in vertical_horizontal[:2]):
        return None
    ratio = vertical_horizontal[0] / vertical_horizontal[1]
    return 1.0 if abs(ratio - 1) < 1e-3 or not 1 / 16 <= ratio <= 16 else ratio


def render(stored: NDArray[Any], grey: Grey) -> tuple[NDArray[np.uint8], str]:
    """One grey frame.

    Args:
        stored: (rows, cols) stored values.

    Returns:
        (256, 256) uint8, and the window policy that was used: `voi-lut`, `window`, `window-exact`,
        `window-sigmoid`, `ct-lung`, `ct-soft`, `full-range` or `percentile`.

    Raises:
        Refused: `constant`.
    """
    values = _fill_padding(stored, grey)
    for policy in _policies(grey, stored.dtype):
        picture = _POLICIES[policy](values, grey, policy)
        if picture.min() != picture.max():
            return square(np.subtract(255, picture) if grey.inverted else picture), policy
    raise Refused("constant")


def render_colour(luma: NDArray[np.uint8], aspect: float) -> tuple[NDArray[np.uint8], str]:
    """One colour frame that was made grey: uint8 already, no window applies (PS3.3 C.11.2 is for grey).

    Raises:
        Refused: `constant`.
    """
    picture = shrink(luma, aspect)
    if picture.min() == picture.max():
        raise Refused("constant")
    return square(picture), "full-range"


def shrink(image: NDArray[Any], aspect: float) -> NDArray[Any]:
    """Scale so that the longer side is `SIDE`, in millimetres and not in pixels; nothing is cropped."""
    rows, cols = image.shape
    height, width = rows * aspect, float(cols)
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size == (cols, rows):
        return image
    smaller = size[0] <= cols and size[1] <= rows
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)


def square(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Centre the picture in a black square of `SIDE`."""
    rows, cols = picture.shape
    if (rows, cols) == (SIDE, SIDE):
        return np.ascontiguousarray(picture)
    out = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (SIDE - rows) // 2, (SIDE - cols) // 2
    out[top : top + rows, left : left + cols] = picture
    return out


def _policies(grey: Grey, dtype: np.dtype[Any]) -> list[str]:
    """The policies to try, best first; the next one is taken where the result is flat (a wrong window)."""
    found = []
    if grey.voi_lut is not None:
        found.append("voi-lut")
    if grey.window is not None:
        found.append(
            {"LINEAR": "window", "LINEAR_EXACT": "window-exact", "SIGMOID": "window-sigmoid"}[grey.window.function]
        )
    if grey.modality == "CT":
        lung = any(word in grey.body_part for word in ("CHEST", "LUNG", "THORAX"))
        found.append("ct-lung" if lung else "ct-soft")
    elif grey.modality == "US" and dtype.itemsize == 1:
        found.append("full-range")
    return [*found, "percentile"]


def _linear(values: NDArray[Any], grey: Grey, policy: str) -> NDArray[np.uint8]:
    """Shrink, then one affine step: 20 us instead of 600 us, and only saturated pixels differ from the other order."""
    window = {"ct-lung": Window(*CT_LUNG), "ct-soft": Window(*CT_SOFT)}.get(policy, grey.window)
    if window is None:
        raise ValueError(policy)
    low, high = window.limits()
    return _affine(_rescaled(values, grey, fine=(high - low) < _FINE * abs(grey.slope)), low, high)


def _percentile(values: NDArray[Any], grey: Grey, policy: str) -> NDArray[np.uint8]:
    """No window: the values between two percentiles of the small picture; its whole range where those meet."""
    small = _rescaled(values, grey, fine=True)
    low, high = np.percentile(small, PERCENTILES)
    if low == high:
        low, high = small.min(), small.max()
    return _affine(small, float(low), float(high)) if low < high else np.zeros(small.shape, np.uint8)


def _full_range(values: NDArray[Any], grey: Grey, policy: str) -> NDArray[np.uint8]:
    """8-bit ultrasound: the values are the picture."""
    return shrink(np.ascontiguousarray(values).view(np.uint8), grey.aspect)


def _sigmoid(values: NDArray[Any], grey: Grey, policy: str) -> NDArray[np.uint8]:
    """PS3.3 C.11.2.1.3.1; not linear, so it comes before shrinking."""
    if grey.window is None:
        raise ValueError(policy)
    full = _modality(values, grey)
    exponent = np.clip(-4 * (full - grey.window.centre) / grey.window.width, -80, 80)
    return _affine(shrink((1 / (1 + np.exp(exponent))).astype(np.float32), grey.aspect), 0.0, 1.0)


def _voi_lut(values: NDArray[Any], grey: Grey, policy: str) -> NDArray[np.uint8]:
    """PS3.3 C.11.2.1.1; the table's own range, not the image's, becomes 0..255."""
    if grey.voi_lut is None:
        raise ValueError(policy)
    table = grey.voi_lut.table
    return _affine(
        shrink(grey.voi_lut.apply(_modality(values, grey)), grey.aspect), float(table.min()), float(table.max())
    )


_POLICIES: Final = {
    "voi-lut": _voi_lut,
    "window": _linear,
    "window-exact": _linear,
    "window-sigmoid": _sigmoid,
    "ct-lung": _linear,
    "ct-soft": _linear,
    "full-range": _full_range,
    "percentile": _percentile,
}


def _modality(values: NDArray[Any], grey: Grey) -> NDArray[np.float32]:
    """Stored to rescaled values at full size."""
    if grey.modality_lut is not None:
        return grey.modality_lut.apply(values)
    return values.astype(np.float32) * np.float32(grey.slope) + np.float32(grey.intercept)


def _rescaled(values: NDArray[Any], grey: Grey, *, fine: bool) -> NDArray[np.float32]:
    """Shrunk and rescaled values; rescaling is linear, so it comes after shrinking."""
    if grey.modality_lut is not None:
        return shrink(grey.modality_lut.apply(values), grey.aspect)
    exact = values.dtype.itemsize > 2 or values.dtype == np.int8
    small = shrink(values.astype(np.float32) if exact or fine else values, grey.aspect).astype(np.float32, copy=False)
    return (
        small if (grey.slope, grey.intercept) == (1, 0) else small * np.float32(grey.slope) + np.float32(grey.intercept)
    )


def _affine(values: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    """low..high to 0..255, rounded; a step at `high` where they meet (window width 1)."""
    if high <= low:
        return np.where(values > high, 255, 0).astype(np.uint8)
    scale = np.float32(255 / (high - low))
    out = values * scale
    out += np.float32(0.5 - low * float(scale))
    np.clip(out, 0, 255.5, out=out)
    return out.astype(np.uint8)


def _fill_padding(stored: NDArray[Any], grey: Grey) -> NDArray[Any]:
    """Padding is no tissue (PS3.3 C.7.5.1.1.2): it takes the value that becomes black, before any percentile."""
    if grey.padding is None:
        return stored
    low, high = grey.padding
    mask = stored == low if low == high else (stored >= low) & (stored <= high)
    if not mask.any():
        return stored
    if mask.all():
        raise Refused("constant")
    tissue = stored[~mask]
    black_is_high = grey.inverted != (grey.slope < 0)
    out = stored.copy()
    out[mask] = tissue.max() if black_is_high else tissue.min()
    return out


def _padding(header: Header, *, signed: bool) -> tuple[int, int] | None:
    value = header.padding("PixelPaddingValue", signed=signed)
    if value is None:
        return None
    limit = header.padding("PixelPaddingRangeLimit", signed=signed)
    return (value, value) if limit is None else (min(value, limit), max(value, limit))
