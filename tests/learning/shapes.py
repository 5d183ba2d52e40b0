"""Shapes of eight classes for the class-subset test.

After performance yardsticks of federated learning: pooled training saturates within half of the budget, so that what
is left between pooled and federated training is not what longer training would bring.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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


def draw(kinds: Sequence[int], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """One picture (SIDE, SIDE): shapes of `kinds` anywhere, on a broad background, with noise."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    bump = rng.uniform(0, 1, 2)
    image = 0.25 + 0.25 * np.exp(-((x - bump[0]) ** 2 + (y - bump[1]) ** 2) / 0.3)
    for kind in kinds:
        centre, radius = rng.uniform(0.2, 0.8, 2), rng.uniform(0.15, 0.22)
        dx, dy = (x - centre[0]) / radius, (y - centre[1]) / radius
        image += rng.uniform(0.25, 0.5) * SHAPES[kind](np.hypot(dx, dy), dx, dy)
    return np.clip((image + rng.normal(0, 0.06, x.shape)) * 255, 0, 255).astype(np.uint8)


def drawn(first: Mapping[int, int], labelled: Collection[int], rows: Sequence[int], seed: Sequence[int]) -> Images:
    """Pictures of two shapes each, in a seeded order: the first as often as `first` says, the second any other.

    Whoever looks at them knows the kinds `labelled` only; kind k carries label `rows[k]`.
    """
    rng = np.random.default_rng(seed)
    pixels, labels = [], []
    for kind in rng.permutation(np.repeat(list(first), list(first.values()))).tolist():
        second = int((kind + rng.integers(1, len(SHAPES))) % len(SHAPES))
        pixels.append(draw((kind, second), rng))
        labels.append(tuple(rows[each] for each in (kind, second) if each in labelled))
    return Images(np.stack(pixels), labels)
