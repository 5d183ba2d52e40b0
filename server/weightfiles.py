"""Weight files that a command was given, in any layout: read, and looked at by the guard before they are used."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from rin.common import formats, guard
from rin.common.formats import Weights
from rin.common.guard import Verdict
from rin.server.phantom import PHANTOM_LABELS, SITES, draw

log = logging.getLogger(__name__)

SEED: Final = 726  # of the images that stand for key images; any


@functools.lru_cache(maxsize=4)
def phantom_images(n: int = 14, seed: int = SEED) -> npt.NDArray[np.uint8]:
    """Images of every phantom label in turn, by the scanners of all phantom sites: uint8 (n, 256, 256)."""
    rng, sites = np.random.default_rng(seed), list(SITES.values())
    images = np.empty((n, 256, 256), np.uint8)
    for i in range(n):
        label = list(PHANTOM_LABELS)[i % len(PHANTOM_LABELS)]
        scanner = sites[i % len(sites)].scanners[label.partition("_")[0]]
        drawn = cv2.resize(draw(label, rng, scanner), (256, 256), interpolation=cv2.INTER_AREA)
        images[i] = np.round(np.clip(drawn, 0, 1) * 255)
    return images


def open_weights(
    path: Path, *, normalisation: str | None = None, image_size: int | None = None
) -> tuple[Weights, Verdict]:
    """The weights at `path` in any layout, and what the guard says of their normalisation; a warning is logged too.

    Raises:
        ConfigError, RefusedError: as `rin.common.formats.read`.
    """
    weights = formats.read(path, normalisation=normalisation, image_size=image_size)
    verdict = guard.check(formats.network_of(weights), phantom_images())
    for note in weights.notes:
        log.info("%s: %s", path.name, note)
    if verdict.warning:
        log.warning("%s: %s", path.name, verdict.warning)
    return weights, verdict
