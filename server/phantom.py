"""Procedural radiology images: anatomy-like background, a pathology whose shape and texture decide the label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from rin.server.scanners import PHANTOM_LABELS, SITES, MappingRow, Scanner, Site

__all__ = ["PHANTOM_LABELS", "SITES", "TASKS", "MappingRow", "Scanner", "Site", "draw", "draw_lesion", "task_images"]

Image = npt.NDArray[np.floating]
Point = tuple[float, float]  # x, y in canvas pixels
Rng = np.random.Generator
Pattern = Callable[[Rng, Point, float], Image]

SIDE: Final = 256  # the canvas; everything is drawn on it and then sampled by the scanner
_Y, _X = (axis.astype(np.float32) for axis in np.mgrid[0:SIDE, 0:SIDE])


def _clouds(rng: Rng, period: float) -> Image:
    """Smooth noise of unit deviation whose lumps are about `period` canvas pixels wide."""
    cells = max(4, int(np.ceil(SIDE / period)) + 3)
    grid = rng.standard_normal((cells, cells), dtype=np.float32)
    field = cv2.resize(grid, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    return np.asarray(field / max(float(field.std()), 1e-6), np.float32)


def _ramp(signed: Image, soft: float) -> Image:
    """1 inside (positive), 0 outside, a linear edge of `soft` pixels."""
    return np.clip(signed / soft + 0.5, 0.0, 1.0)


def _polar(centre: Point) -> tuple[Image, Image]:
    """Distance in pixels and angle in radians from `centre`."""
    distance, angle = cv2.cartToPolar(_X - np.float32(centre[0]), _Y - np.float32(centre[1]))
    return distance, angle  # type: ignore[return-value]  # OpenCV's stubs lose the dtype


def _ellipse(centre: Point, axes: Point, tilt: float, soft: float) -> Image:
    """Filled ellipse with half `axes` in pixels, turned by `tilt` radians."""
    cos, sin = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    dx, dy = _X - np.float32(centre[0]), _Y - np.float32(centre[1])
    u, v = (dx * cos + dy * sin) / axes[0], (dy * cos - dx * sin) / axes[1]
    return _ramp((1.0 - np.sqrt(u * u + v * v)) * min(axes), soft)


def _star(rng: Rng, centre: Point, radius: float, *, waves: int, core: float, power: float, soft: float) -> Image:
    """A disc of radius `core * radius` with `waves` spikes that reach `radius`; a higher power makes thinner spikes."""
    distance, angle = _polar(centre)
    lobes = (0.5 + 0.5 * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))) ** power
    reach = 1.0 + 0.25 * np.cos(angle * 2 + rng.uniform(0, 2 * np.pi))
    return _ramp(radius * (core + (1.0 - core) * lobes * reach) - distance, soft)


# The patterns. Each takes the generator, the centre and the radius, and gives a picture in about 0..1.


def _smooth(rng: Rng, centre: Point, radius: float) -> Image:
    return _ellipse(centre, (radius * 0.78, radius * rng.uniform(0.5, 0.78)), rng.uniform(0, np.pi), 5.0)


def _spiculated(rng: Rng, centre: Point, radius: float) -> Image:
    return _star(rng, centre, radius * 1.25, waves=int(rng.integers(5, 8)), core=0.36, power=1.5, soft=3.0)


def _lobed(rng: Rng, centre: Point, radius: float) -> Image:
    return _star(rng, centre, radius * 1.2, waves=int(rng.integers(3, 5)), core=0.25, power=1.3, soft=radius * 0.35)


def _cloudy(rng: Rng, centre: Point, radius: float) -> Image:
    patch = _ellipse(centre, (radius * 1.2, radius * rng.uniform(0.9, 1.2)), rng.uniform(0, np.pi), radius * 0.8)
    return patch * np.clip(0.4 + 0.9 * _clouds(rng, 14.0), 0.0, 1.6)


def _reticular(rng: Rng, centre: Point, radius: float) -> Image:
    patch = _ellipse(centre, (radius * 1.4, radius * 1.2), rng.uniform(0, np.pi), radius * 0.5)
    tilt, period = rng.uniform(0, np.pi), rng.uniform(15.0, 19.0)
    mesh = np.zeros((SIDE, SIDE), np.float32)
    for turn in (0.0, np.pi / 2):
        along = _X * np.float32(np.cos(tilt + turn)) + _Y * np.float32(np.sin(tilt + turn))
        mesh = np.maximum(mesh, np.cos(along * np.float32(2 * np.pi / period)))
    return patch * np.clip(mesh, 0.0, 1.0) ** 2 * 1.3


def _ring(rng: Rng, centre: Point, radius: float) -> Image:
    distance, _ = _polar(centre)
    return np.exp(-(((distance - np.float32(radius)) / np.float32(3.2)) ** 2))


def _rings(rng: Rng, centre: Point, radius: float) -> Image:
    turn = rng.uniform(0, 2 * np.pi)
    rings = [
        _ring(rng, (centre[0] + radius * 0.8 * np.cos(a), centre[1] + radius * 0.8 * np.sin(a)), radius * 0.45)
        for a in turn + np.arange(3) * 2 * np.pi / 3
    ]
    return np.maximum.reduce(rings) * 1.3


def _wedge(rng: Rng, centre: Point, radius: float) -> Image:
    turn, spread = rng.uniform(0, 2 * np.pi), rng.uniform(2.2, 2.5)
    rays = [(np.cos(angle), np.sin(angle)) for angle in (turn, turn + spread, turn - spread)]
    shape = np.zeros((SIDE, SIDE), np.float32)
    for reach, level in ((1.35 * radius, 1.0), (0.7 * radius, -0.5)):  # a rim around a cavity
        corners = np.round((np.array(centre) + reach * np.array(rays)) * 16).astype(np.int32)
        cv2.fillPoly(shape, [corners], level, cv2.LINE_8, 4)
    return cv2.GaussianBlur(shape, (0, 0), 1.5)  # type: ignore[return-value]


def _spots(rng: Rng, centre: Point, radius: float) -> Image:
    count = int(rng.integers(5, 8))
    turn, size = rng.uniform(0, 2 * np.pi), radius * 0.24
    angles = turn + np.arange(count) * 2 * np.pi / count + rng.uniform(-0.2, 0.2, count)
    spots = np.zeros((SIDE, SIDE), np.float32)
    for angle in angles:
        reach = radius * rng.uniform(0.75, 1.25)
        spots = np.maximum(
            spots, _ramp(size - _polar((centre[0] + reach * np.cos(angle), centre[1] + reach * np.sin(angle)))[0], 4.0)
        )
    return spots


def _target(rng: Rng, centre: Point, radius: float) -> Image:
    distance, _ = _polar(centre)
    return np.exp(-(((distance - np.float32(radius * 0.85)) / np.float32(4.5)) ** 2)) + _ramp(
        radius * 0.3 - distance, 4.0
    )


def _tube(rng: Rng, centre: Point, radius: float) -> Image:
    tilt = rng.uniform(0, np.pi)
    return _ellipse(centre, (radius * 1.9, radius * 0.32), tilt, 4.0)


def _bean(rng: Rng, centre: Point, radius: float) -> Image:
    tilt = rng.uniform(0, np.pi)
    outer = _ellipse(centre, (radius * 1.25, radius * 0.75), tilt, 4.0)
    return outer - 1.3 * _ellipse(centre, (radius * 0.7, radius * 0.32), tilt, 4.0)


def _shadowed(rng: Rng, centre: Point, radius: float) -> Image:
    body = _ellipse(centre, (radius * 0.85, radius * 0.6), rng.uniform(-0.6, 0.6), 3.0)
    across = _ramp(radius * 0.45 - np.abs(_X - np.float32(centre[0])), 8.0)
    below = np.clip((_Y - np.float32(centre[1] + radius * 0.55)) / 8.0, 0.0, 1.0)
    fade = np.exp(-np.maximum(_Y - np.float32(centre[1]), 0.0) / np.float32(radius * 1.6))
    return body - 1.1 * across * below * fade * (1.0 - body)


PATTERNS: Final[dict[str, Pattern]] = {
    "CT_lung_Airspace_opacity": _cloudy,
    "CT_lung_Bronchiectasis": _rings,
    "CT_lung_Nodule": _spiculated,
    "CT_lung_interstitial_lung_disease": _reticular,
    "CT_lung_normal": _smooth,
    "MR_brain_chronic_infarct": _wedge,
    "MR_brain_edema": _lobed,
    "MR_brain_intra": _target,
    "MR_brain_normal": _smooth,
    "MR_brain_white_matter_changes": _spots,
    "US_usabd_aorta": _tube,
    "US_usabd_gb": _shadowed,
    "US_usabd_kidney": _bean,
    "US_usabd_liver": _spots,
}


# The anatomy. Each gives the background in 0..1, the region in which findings lie, and where they may be centred.


def _thorax(rng: Rng) -> tuple[Image, Image, list[Point]]:
    """Axial CT of the chest in the lung window: -1350 HU is 0 and 150 HU is 1."""
    cx, cy = 128 + rng.uniform(-5, 5), 130 + rng.uniform(-5, 5)
    wide, high = rng.uniform(112, 120), rng.uniform(88, 98)
    body = _ellipse((cx, cy), (wide, high), 0.0, 2.0)
    image = 0.23 + 0.62 * body + 0.09 * _ellipse((cx, cy), (wide - 7, high - 7), 0.0, 3.0)
    lungs = np.zeros_like(image)
    centres = []
    for side in (-1, 1):
        centre = (cx + side * wide * 0.47, cy - 3 + rng.uniform(-3, 3))
        lungs = np.maximum(lungs, _ellipse(centre, (wide * 0.42, high * 0.80), side * rng.uniform(0.0, 0.12), 3.0))
        centres += [(centre[0] + rng.uniform(-6, 6), centre[1] + rng.uniform(-34, 34))]
    heart = _ellipse((cx + rng.uniform(4, 14), cy + 8), (rng.uniform(20, 28), 30), rng.uniform(-0.5, 0.5), 4.0)
    lungs *= 1.0 - heart
    air = 0.47 + 0.018 * _clouds(rng, 10.0) + 0.0003 * (_Y - 128)
    image = image * (1 - lungs) + air * lungs
    image += 0.13 * lungs * _vessels(rng, [(cx - 22, cy), (cx + 22, cy)])
    bones = _ellipse((cx, cy + high * 0.70), (13, 12), 0.0, 3.0) - 0.9 * _ellipse(
        (cx, cy + high * 0.86), (6, 5), 0.0, 3.0
    )
    ribs = np.zeros((SIDE, SIDE), np.float32)
    for angle in rng.uniform(0, 0.5) + np.arange(11) * 2 * np.pi / 11:
        spot = (cx + (wide - 9) * np.cos(angle), cy + (high - 9) * np.sin(angle))
        cv2.ellipse(ribs, (spot, (20.0, 8.0), float(np.degrees(angle)) + 90.0), 1.0, cv2.FILLED)
    bones = np.maximum(bones, cv2.GaussianBlur(ribs, (0, 0), 1.0))
    return np.clip(image + 0.25 * bones, 0.0, 1.0), lungs, centres


def _vessels(rng: Rng, roots: list[Point]) -> Image:
    """Thin branching lines from the roots outwards, 0..1."""
    picture = np.zeros((SIDE, SIDE), np.float32)
    for x, y in roots:
        away = np.pi if x < 128 else 0.0
        for start in away + np.linspace(-1.3, 1.3, 7) + rng.uniform(-0.2, 0.2, 7):
            at, angle = np.array([x, y]), start
            for step in range(5):
                angle += rng.uniform(-0.35, 0.35)
                after = at + rng.uniform(10, 18) * np.array([np.cos(angle), np.sin(angle)])
                ends = [tuple(int(v) for v in np.round(p * 16)) for p in (at, after)]
                cv2.line(picture, ends[0], ends[1], 1.0 - 0.15 * step, 3 - step // 2, cv2.LINE_8, 4)
                at = after
    return cv2.GaussianBlur(picture, (0, 0), 0.9)  # type: ignore[return-value]


def _brain(rng: Rng) -> tuple[Image, Image, list[Point]]:
    """Axial MR of the head: scalp, skull, cortex, white matter, ventricles."""
    cx, cy = 128 + rng.uniform(-5, 5), 128 + rng.uniform(-5, 5)
    wide, high = rng.uniform(84, 92), rng.uniform(100, 110)
    head = _ellipse((cx, cy), (wide, high), 0.0, 2.0)
    inner = _ellipse((cx, cy), (wide - 7, high - 7), 0.0, 2.0)
    brain = _ellipse((cx, cy), (wide - 14, high - 14), 0.0, 3.0)
    folds = np.clip(_clouds(rng, 9.0), -1.2, 1.2)
    white = _ramp(_ellipse((cx, cy), (wide - 24, high - 24), 0.0, 40.0) - 0.5 + 0.12 * folds, 0.25)
    tissue = 0.42 + 0.10 * white + 0.02 * _clouds(rng, 20.0)
    tissue -= 0.12 * np.clip(1 - np.abs(_X - cx) / 2.5, 0, 1)
    for side in (-1, 1):
        for lift in (-1, 1):
            horn = (cx + side * rng.uniform(9, 12), cy + lift * rng.uniform(14, 20))
            tissue -= 0.22 * _ellipse(horn, (5.5, rng.uniform(14, 18)), side * lift * -0.35, 3.0)
    image = 0.75 * (head - inner) + 0.06 * inner * (1 - brain) + np.clip(tissue, 0.12, 1) * brain
    angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.62)
    centres = [
        (cx + (wide - 14) * reach * np.cos(a), cy + (high - 14) * reach * np.sin(a)) for a in (angle, angle + np.pi)
    ]
    return image, brain, centres


def _abdomen(rng: Rng) -> tuple[Image, Image, list[Point]]:
    """Ultrasound sector: skin and fascia layers, then parenchyma; speckle is added by the scanner."""
    apex = (128 + rng.uniform(-4, 4), rng.uniform(-45, -30))
    distance, angle = _polar(apex)
    off = np.abs(angle - np.float32(np.pi / 2))
    fan = _ramp((np.float32(rng.uniform(0.56, 0.64)) - off) * distance, 2.0) * _ramp(
        np.float32(288 + apex[1]) - distance + 8, 2.0
    )
    fan *= _ramp(distance - np.float32(-apex[1] + 12), 2.0)
    depth = distance + apex[1] - 12
    tissue = 0.42 + 0.03 * _clouds(rng, 26.0)
    edge = 0.0
    for _ in range(4):
        edge += rng.uniform(6, 12)
        wave = depth - np.float32(edge) - 1.5 * _clouds(rng, 60.0)
        tissue += np.float32(rng.uniform(0.10, 0.22)) * np.exp(-((wave / 2.2) ** 2))
    tissue += 0.3 * np.exp(-(((depth - np.float32(rng.uniform(205, 225)) - 4 * _clouds(rng, 50.0)) / 4.0) ** 2))
    slots = [(128 + side * rng.uniform(26, 50), rng.uniform(105, 175)) for side in (-1, 1)]
    return tissue, fan, slots


ANATOMY: Final[dict[str, Callable[[Rng], tuple[Image, Image, list[Point]]]]] = {
    "CT": _thorax,
    "MR": _brain,
    "US": _abdomen,
}
_STRENGTH: Final = {"CT": 0.26, "MR": 0.28, "US": 0.24}
_MASS: Final = 1.3  # integral of a pattern in units of its squared radius, the same for all labels
_SPECKLE: Final = {"CT": 0.0, "MR": 0.0, "US": 0.13}


def _finding(rng: Rng, pattern: Pattern, centre: Point, radius: float) -> Image:
    """One pattern of random polarity, scaled to the same mass whatever its shape, so that no mean tells the label."""
    picture = pattern(rng, centre, radius)
    mass = float(np.abs(picture).sum()) / radius**2
    sign = 1.0 if rng.random() < 0.5 else -1.0
    return picture * np.float32(sign * np.clip(_MASS / mass, 0.55, 1.6) * rng.uniform(0.85, 1.15))


def _compose(rng: Rng, modality: str, findings: list[Pattern]) -> tuple[Image, Image]:
    """Background with findings; and the support of the first finding, both (SIDE, SIDE)."""
    image, region, slots = ANATOMY[modality](rng)
    order = rng.permutation(len(slots))
    support = np.zeros((SIDE, SIDE), np.float32)
    for place, pattern in enumerate(findings[: len(slots)]):
        x, y = slots[order[place]]
        radius = rng.uniform(25.0, 34.0)
        layer = _finding(rng, pattern, (x, y), radius)
        image = image + np.float32(_STRENGTH[modality]) * layer * region
        if place == 0:
            support = layer
    return image * region if modality == "US" else image, support


def _sample(rng: Rng, canvas: Image, scanner: Scanner, warp: npt.NDArray[np.float64]) -> Image:
    """The canvas through a scanner's field of view, matrix, grey curve and noise: float32 (rows, columns) in 0..1."""
    rows, columns = scanner.matrix
    scale = np.diag([columns / SIDE, rows / SIDE, 1.0])[:2] @ np.vstack([warp, [0, 0, 1]])
    fill = 0.23 if scanner.modality == "CT" else 0.0
    image = cv2.warpAffine(canvas, scale, (columns, rows), flags=cv2.INTER_LINEAR, borderValue=fill)
    noise = cv2.GaussianBlur(rng.standard_normal((rows, columns), dtype=np.float32), (0, 0), 0.8) * np.float32(2.2)
    speckle = np.float32(_SPECKLE[scanner.modality]) * image
    image = np.clip(image, 0.0, 1.0) ** np.float32(scanner.contrast) + noise * (np.float32(scanner.noise) + speckle)
    return np.clip(image, 0.0, 1.0).astype(np.float32)


def _warp(rng: Rng, zoom: float) -> npt.NDArray[np.float64]:
    """A patient's position: zoom, a few degrees of turn, a few pixels of shift; 2x3."""
    turn = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), rng.uniform(-7, 7), zoom * rng.uniform(0.95, 1.05))
    turn[:, 2] += rng.uniform(-4, 4, 2)
    return np.asarray(turn, np.float64)


def draw(label: str, rng: Rng, scanner: Scanner, *, also: str | None = None) -> Image:
    """One image that shows `label` (and `also`, of the same anatomy), as `scanner` would show it.

    Returns:
        float32 of shape `scanner.matrix` in 0..1, the display range: for CT 0 is -1350 HU and 1 is 150 HU.

    Raises:
        KeyError: a label that is not in `PHANTOM_LABELS`.
    """
    findings = [PATTERNS[label], PATTERNS[also] if also else _smooth]  # the second one distracts
    canvas, _ = _compose(rng, scanner.modality, findings)
    return _sample(rng, canvas, scanner, _warp(rng, scanner.zoom))


_BENCH: Final = {m: Scanner(m, "PHANTOM", 0.030, 1.0, 300.0, 1.0, (SIDE, SIDE)) for m in ("CT", "MR", "US")}


def _capsule(rng: Rng, centre: Point, radius: float) -> Image:
    """A smooth nodule with a thin rim."""
    axes, tilt = (radius, radius * rng.uniform(0.7, 0.95)), rng.uniform(0, np.pi)
    body = _ellipse(centre, axes, tilt, 3.0)
    return body - 0.5 * (body - _ellipse(centre, (axes[0] - 8, axes[1] - 8), tilt, 3.0))


def _irregular(rng: Rng, centre: Point, radius: float) -> Image:
    """A spiculated nodule with an uneven inside."""
    spikes = _star(rng, centre, radius * 1.2, waves=int(rng.integers(5, 12)), core=0.55, power=1.5, soft=4.0)
    return spikes * np.clip(1.0 + 0.35 * _clouds(rng, 12.0), 0.4, 1.6)


# Task -> kinds; the index in the tuple is the task's label. Kinds share edges and texture with the labels above.
TASKS: Final[dict[str, tuple[str, ...]]] = {"phantom-nodule": ("benign", "malignant"), "phantom-lesion": ("lesion",)}
_KINDS: Final[dict[str, tuple[str, list[Pattern]]]] = {
    "benign": ("US", [_capsule, _smooth]),
    "malignant": ("US", [_irregular, _smooth]),
    "lesion": ("MR", [_irregular, _smooth]),
}


def _outline(layer: Image) -> npt.NDArray[np.bool_]:
    """The lesion as a reader would draw it: the largest part above a quarter of the peak, holes filled."""
    above = (layer > 0.25 * float(layer.max())).astype(np.uint8)
    contours, _ = cv2.findContours(above, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    mask = np.zeros_like(above)
    cv2.drawContours(mask, [max(contours, key=cv2.contourArea)], -1, 1, cv2.FILLED)
    return mask.astype(np.bool_)


def draw_lesion(kind: str, rng: Rng) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """One image of a downstream task, as it would look after ingest, with the mask of its lesion.

    Returns:
        uint8 grey (256, 256) and a boolean mask of the same shape.

    Raises:
        KeyError: `kind` is none of "benign", "malignant", "lesion".
    """
    modality, patterns = _KINDS[kind]
    scanner = _BENCH[modality]
    canvas, support = _compose(rng, modality, patterns)
    warp = _warp(rng, scanner.zoom)
    mask = _outline(np.asarray(cv2.warpAffine(np.abs(support), warp, (SIDE, SIDE)), np.float32))
    return np.round(_sample(rng, canvas, scanner, warp) * 255).astype(np.uint8), mask


def task_images(
    task: str, n: int, seed: int, size: int = SIDE
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """`n` images of a row of `TASKS`, kinds in turn; image i depends on task, seed and i only.

    Returns:
        images uint8 (n, size, size); labels int64 (n,), the index of the kind; masks uint8 (n, size, size) in 0..1.
    """
    kinds = TASKS[task]
    images = np.empty((n, size, size), np.uint8)
    masks = np.empty((n, size, size), np.uint8)
    labels = np.arange(n, dtype=np.int64) % len(kinds)
    for i in range(n):
        rng = np.random.default_rng([seed, sorted(TASKS).index(task), i])
        image, mask = draw_lesion(kinds[labels[i]], rng)
        images[i] = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
        masks[i] = cv2.resize(mask.astype(np.uint8) * 255, (size, size), interpolation=cv2.INTER_AREA) > 127
    return images, labels, masks
