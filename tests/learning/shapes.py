"""Shapes of eight classes for the class-subset test: small pictures that a network learns in a minute.

After performance yardsticks of federated learning: pooled training saturates within half of the budget, so that what
is left between pooled and federated training is not what longer training would bring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from tests.simulator import Images

SIDE: Final = 32
Grid = npt.NDArray[np.float64]

# What is inside each shape, from the distance r to its centre in radii and the offsets x, y in radii.
SHAPES: Final[tuple[Callable[[Grid, Grid, Grid], npt.NDArray[np.bool_]], ...]] = (
    lambda r, x, y: r < 1,  # disc
    lambda r, x, y: (r < 1) & (r > 0.6),  # ring
    lambda r, x, y: (abs(x) < 0.85) & (abs(y) < 0.85),  # square
    lambda r, x, y: (abs(x) < 1.1) & (abs(y) < 0.4),  # horizontal bar
    lambda r, x, y: (abs(x) < 0.4) & (abs(y) < 1.1),  # vertical bar
    lambda r, x, y: r < 0.7 + 0.35 * np.cos(4 * np.arctan2(y, x)),  # four lobes
    lambda r, x, y: abs(x) + abs(y) < 1.1,  # diamond
    lambda r, x, y: (r < 0.4) | ((r > 0.7) & (r < 1.1)),  # disc within a ring
)


def draw(kind: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """One picture (SIDE, SIDE): shape `kind` anywhere, on a broad background, with noise."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    centre, radius = rng.uniform(0.3, 0.7, 2), rng.uniform(0.18, 0.28)
    bump = rng.uniform(0, 1, 2)
    ground = 0.25 + 0.25 * np.exp(-((x - bump[0]) ** 2 + (y - bump[1]) ** 2) / 0.3)
    dx, dy = (x - centre[0]) / radius, (y - centre[1]) / radius
    inside = SHAPES[kind](np.hypot(dx, dy), dx, dy)
    image = ground + rng.uniform(0.35, 0.6) * inside + rng.normal(0, 0.06, x.shape)
    return np.clip(image * 255, 0, 255).astype(np.uint8)


def drawn(counts: Mapping[int, int], rows: tuple[int, ...], seed: tuple[int, ...]) -> Images:
    """`counts` pictures of each kind in a seeded order; kind k carries label `rows[k]`."""
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(np.repeat(list(counts), list(counts.values())))
    return Images(np.stack([draw(int(kind), rng) for kind in kinds]), [(rows[kind],) for kind in kinds])
