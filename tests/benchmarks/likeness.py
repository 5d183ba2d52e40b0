"""How alike two grey pictures are: PSNR and SSIM."""

from __future__ import annotations

import math
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.floating]

SPREAD: Final = 1.5  # deviation of SSIM's window in pixels, which is 11 wide
STEADY: Final = (0.01**2, 0.03**2)


def psnr(one: Picture, other: Picture) -> float:
    """Peak signal-to-noise ratio in dB of pictures (h, w) in 0..1; infinite where they are the same."""
    error = float(np.mean((np.float64(one) - np.float64(other)) ** 2))
    return -10 * math.log10(error) if error else math.inf


def ssim(one: Picture, other: Picture) -> float:
    """Structural similarity of pictures (h, w) in 0..1: 1 for the same picture, about 0 for unrelated ones.

    Mean over all places with a whole window (Wang et al. 2004, with its Gaussian window and constants).
    """
    x, y = np.asarray(one, np.float64), np.asarray(other, np.float64)
    mean_x, mean_y = _local(x), _local(y)
    var_x, var_y = _local(x * x) - mean_x**2, _local(y * y) - mean_y**2
    both = _local(x * y) - mean_x * mean_y
    a, b = STEADY
    found = (2 * mean_x * mean_y + a) * (2 * both + b) / ((mean_x**2 + mean_y**2 + a) * (var_x + var_y + b))
    return float(found[5:-5, 5:-5].mean())


def _local(values: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    return np.asarray(cv2.GaussianBlur(values, (11, 11), SPREAD))
