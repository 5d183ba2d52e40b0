"""How training images are changed on the device: each by its own draws, by anatomy and modality."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from rin.common.labels import label_set
from rin.common.plan import Augment

# Whether an image seen in a mirror could be one of another patient. Organs of the trunk have a side: a liver on the
# left is no liver. Limbs come in pairs, and brain, spine and thyroid are alike on both sides.
MIRRORED: Final[dict[tuple[str, str], bool]] = {
    ("CT", "abd"): False,
    ("CT", "lung"): False,
    ("MR", "af"): True,
    ("MR", "brain"): True,
    ("MR", "hip"): True,
    ("MR", "knee"): True,
    ("MR", "mriabd"): False,
    ("MR", "shoulder"): True,
    ("MR", "spine"): True,
    ("US", "usabd"): False,
    ("US", "usthyroid"): True,
}

# Grey values of a CT are a density through a window, so they change as another window would show them. Those of MR and
# US have no unit, and their curve differs from scanner to scanner.
WINDOWED: Final[dict[str, bool]] = {"CT": True, "MR": False, "US": False}

DRAWS: Final = 13  # numbers an image, whichever are used: one option does not change what another draws
ERASED: Final = (0.02, 0.2)  # share of the image's area (Zhong et al. 2020, there up to 0.4)
LONGEST: Final = 3.3  # ratio of the sides of what is erased


@dataclass(frozen=True, slots=True)
class Kinds:
    """What each image of a batch is, bool (b,): may be mirrored; shows a window (CT); has no unit (MR, US)."""

    mirrored: Tensor
    windowed: Tensor
    unitless: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> Kinds:
        """By the images' own labels, bool (b, labels of the label set)."""
        sided, windowed, unitless = (rows.to(labels.device) for rows in _rows())
        return cls(~(labels & sided).any(1), (labels & windowed).any(1), (labels & unitless).any(1))

    @classmethod
    def unknown(cls, count: int, device: torch.device) -> Kinds:
        """Of images whose labels say nothing about modality and anatomy: never mirrored, taken as without unit."""
        no = torch.zeros(count, dtype=torch.bool, device=device)
        return cls(no, no, ~no)


@functools.cache
def _rows() -> tuple[Tensor, Tensor, Tensor]:
    """Which labels are of an anatomy with a side, of a CT, of MR or US; bool (labels,)."""
    sided = torch.tensor([not MIRRORED[label.modality, label.anatomy] for label in label_set()])
    windowed = torch.tensor([WINDOWED[label.modality] for label in label_set()])
    return sided, windowed, ~windowed


def augment(stack: Tensor, options: Augment, kinds: Kinds, generator: torch.Generator) -> Tensor:
    """Move, shade and erase, as `options` says.

    Without zoom and rotation, pixels are moved and never interpolated, and black stays black: a short training on
    smoother or brighter images than are shown later leaves batch norms with the wrong statistics.

    Args:
        stack: float (b, c, s, s); the first channel is the image in 0..1, others (masks) only move with it.
        generator: on the CPU, so that every device draws alike.
    """
    draws = torch.rand(len(stack), DRAWS, generator=generator).to(stack.device)
    may = {"anatomy": kinds.mirrored, "always": kinds.mirrored | True, "never": kinds.mirrored & False}[options.flip]
    flip = (draws[:, 0] < 0.5) & may
    move = _resampled if options.zoom or options.rotation else _moved
    moved = move(stack, options, flip, draws[:, 1:5])
    grey = _erased(_shaded(moved[:, :1], options, kinds, draws[:, 5:8]), options, draws[:, 8:])
    return torch.cat([grey, moved[:, 1:]], dim=1) if moved.shape[1] > 1 else grey


def _moved(stack: Tensor, options: Augment, flip: Tensor, draws: Tensor) -> Tensor:
    """Mirror and shift by whole pixels; what comes in is black."""
    count, _, side, _ = stack.shape
    most = int(options.shift * side)
    shift = ((2 * most + 1) * draws[:, :2]).long()  # 0 to 2 * most: where the window begins in the padded image
    along = torch.arange(side, device=stack.device)
    across = torch.where(flip[:, None], along.flip(0), along)
    rows, columns = shift[:, :1] + along, shift[:, 1:] + across
    image = torch.arange(count, device=stack.device)[:, None, None]
    return F.pad(stack, [most] * 4).movedim(1, -1)[image, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _resampled(stack: Tensor, options: Augment, flip: Tensor, draws: Tensor) -> Tensor:
    """Mirror, turn, zoom and shift in one bilinear sampling; what comes in is black."""
    across, down, zoom, turn = (2 * draws - 1).unbind(1)
    scale, angle = 1 / (1 + options.zoom * zoom), options.rotation * math.pi / 180 * turn
    cos, sin, mirror = scale * angle.cos(), scale * angle.sin(), torch.where(flip, -1.0, 1.0)
    # From places in the output to places in the input, both -1..1 from edge to edge.
    rows = [[cos * mirror, -sin, 2 * options.shift * across], [sin * mirror, cos, 2 * options.shift * down]]
    theta = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = F.affine_grid(theta, list(stack.shape), align_corners=False)
    return F.grid_sample(stack, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _shaded(grey: Tensor, options: Augment, kinds: Kinds, draws: Tensor) -> Tensor:
    """Another window of a CT, another curve of MR and US, another brightness of all."""
    edge, curve, gain = (value.view(-1, 1, 1, 1) for value in (2 * draws - 1).unbind(1))
    if options.window:
        lower = edge * options.window * kinds.windowed.view(-1, 1, 1, 1)
        # What lay below the window has one value only, and stays black.
        grey = torch.where(grey > 0, (grey - lower) / (1 - lower), grey).clamp(0, 1)
    if options.gamma:
        grey = grey.clamp(min=0).pow((curve * options.gamma * kinds.unitless.view(-1, 1, 1, 1)).exp())
    return (grey * (1 + options.brightness * gain)).clamp(max=1.0) if options.brightness else grey


def _erased(grey: Tensor, options: Augment, draws: Tensor) -> Tensor:
    """Blacken a rectangle in a share of the images (random erasing, Zhong et al. 2020)."""
    if not options.erase:
        return grey
    side, (least, most) = grey.shape[-1], ERASED
    chosen, area, shape, top, left = draws.unbind(1)
    area, ratio = least + (most - least) * area, ((2 * shape - 1) * math.log(LONGEST)).exp()
    height, width = ((side * part.sqrt()).round()[:, None] for part in (area * ratio, area / ratio))
    along = torch.arange(side, device=grey.device)
    rows = along - (top[:, None] * (side - height)).floor()
    columns = along - (left[:, None] * (side - width)).floor()
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    return grey.masked_fill((inside & (chosen < options.erase)[:, None, None])[:, None], 0.0)
