"""A contact sheet of ingested images with their labels, for a person to look at; it is patient data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from rin.client.home import Home
from rin.client.ingest.cache import SHARD_IMAGES, SIDE, map_shards
from rin.client.ingest.catalog import CatalogImage, read_images
from rin.common.errors import StateError
from rin.common.files import write_atomic
from rin.common.labels import label_set

_CAPTION: Final = 28  # pixels of each of the two lines
_GAP: Final = 4


def contact_sheet(home: Home, out: Path | None = None, n: int = 64) -> Path:
    """Write a PNG (0600) of `n` images, evenly spread over the canonical order, captioned with modality and labels.

    Args:
        out: by default `contact-sheet.png` in the home's vault; outside it, patient data leaves the vault.

    Returns:
        Where it was written.

    Raises:
        StateError: nothing was ingested.
    """
    slots, found = read_images(home.catalog)
    images = list(found)
    if not images:
        raise StateError("the catalog holds no image", step="run `rin-client ingest`, and `--explain` to see why")
    chosen = [images[at] for at in np.unique(np.linspace(0, len(images) - 1, n).round().astype(int))]
    shards = map_shards(home.cache, slots=slots)
    cells = [_cell(shards[image.slot // SHARD_IMAGES][image.slot % SHARD_IMAGES], image) for image in chosen]
    across = math.ceil(math.sqrt(len(cells)))
    cells += [np.zeros_like(cells[0])] * (-len(cells) % across)
    sheet = np.vstack([np.hstack(cells[at : at + across]) for at in range(0, len(cells), across)])
    path = out or home.catalog.with_name("contact-sheet.png")
    write_atomic(path, cv2.imencode(".png", sheet)[1].tobytes(), mode=0o600)
    return path


def _cell(pixels: NDArray[np.uint8], image: CatalogImage) -> NDArray[np.uint8]:
    """One image in a frame that shows where its square ends, with two lines of caption below."""
    cell = np.full((SIDE + 2 * _CAPTION + 2 * _GAP, SIDE + 2 * _GAP), 60, np.uint8)
    cell[_GAP : _GAP + SIDE, _GAP : _GAP + SIDE] = pixels
    names = ", ".join(label_set()[index].finding for index in image.labels) or "no label"
    for line, text in enumerate((f"{image.modality} {image.anatomy}", names)):
        at = (_GAP, _GAP + SIDE + _CAPTION * (line + 1) - 8)
        cv2.putText(cell, text[:34], at, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 255, 1, cv2.LINE_AA)
    return cell
