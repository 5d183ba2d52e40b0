"""Bootstrap intervals of AUC and Dice over test images or patients, and of the paired difference of two inits.

Percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 and 16). A resample
draws whole groups (patients) with replacement where groups are known, else images. One resample is used for every seed
and for both inits, so the difference is paired. The interval therefore speaks of the test images; how far the training
seeds scatter is told by the seeds' own values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
RESAMPLES = 2000
_CELLS = 1 << 22  # resamples times images held at once: 32 MiB of float64


@dataclass(frozen=True, slots=True)
class Interval:
    """A statistic on the test set and its percentile interval; all NaN-free and in the statistic's own unit."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def resample_counts(
    images: int, groups: npt.NDArray[np.int64] | None, *, resamples: int, seed: int
) -> Iterator[npt.NDArray[np.float64]]:
    """How often each test image occurs in each resample, in blocks of rows: float64 (block, images)."""
    rng = np.random.default_rng(seed)
    _, member = np.unique(np.arange(images) if groups is None else groups, return_inverse=True)
    units = int(member.max()) + 1
    block = max(1, _CELLS // max(images, units))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(units, size=(rows, units)) + units * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units)
        yield counts[:, member].astype(np.float64)


def weighted_auc(scores: Floats, positive: npt.NDArray[np.bool_], counts: Floats) -> Floats:
    """AUC of `scores` (images,) in every resample, ties counted half (Mann-Whitney); float64 (resamples,).

    NaN where a resample holds no positive or no negative image.
    """
    order = np.argsort(scores, kind="stable")
    ranked = counts[:, order]
    is_positive = positive[order]
    above, below = ranked * is_positive, ranked * ~is_positive
    steps = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)
    if len(steps) < len(order):
        above, below = np.add.reduceat(above, steps, axis=1), np.add.reduceat(below, steps, axis=1)
    pairs = (above * (np.cumsum(below, axis=1) - 0.5 * below)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return pairs / (above.sum(axis=1) * below.sum(axis=1))


def macro_auc(scores: Floats, targets: npt.NDArray[np.int64], counts: Floats) -> Floats:
    """AUC for two classes, the mean of the one-against-rest AUCs for more; float64 (resamples,).

    Args:
        scores: (images, classes), any monotone function of probability.
        targets: (images,) class indices.
        counts: (resamples, images). A class that a resample lacks is left out of that resample's mean.
    """
    classes = range(1, 2) if scores.shape[1] == 2 else range(scores.shape[1])
    each = np.stack([weighted_auc(scores[:, c], targets == c, counts) for c in classes])
    known = ~np.isnan(each)
    with np.errstate(invalid="ignore"):
        return np.where(known, each, 0.0).sum(axis=0) / known.sum(axis=0)


def mean_dice(dice: Floats, counts: Floats) -> Floats:
    """Mean of the images' Dice (images,) in every resample; float64 (resamples,)."""
    return counts @ dice / counts.sum(axis=1)


def auc_table(scores: Floats, targets: npt.NDArray[np.int64], counts: Floats) -> Floats:
    """`macro_auc` of every seed: `scores` (seeds, images, classes) to (seeds, resamples)."""
    return np.stack([macro_auc(one, targets, counts) for one in scores])


def dice_table(dice: Floats, counts: Floats) -> Floats:
    """`mean_dice` of every seed: `dice` (seeds, images) to (seeds, resamples)."""
    return np.stack([mean_dice(one, counts) for one in dice])


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two inits on one task: mean over seeds with interval, their paired difference, and the value of every seed."""

    checkpoint: Interval
    random: Interval
    difference: Interval
    checkpoint_seeds: tuple[float, ...]
    random_seeds: tuple[float, ...]


def compare(
    checkpoint: Floats,
    random: Floats,
    targets: npt.NDArray[np.int64] | None = None,
    *,
    groups: npt.NDArray[np.int64] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Compare the predictions of two inits on the same test images.

    Args:
        checkpoint, random: class scores (seeds, images, classes) with `targets`, or Dice (seeds, images) without.
        targets: (images,) class indices; None says that the arrays hold Dice.
        groups: (images,) patient numbers, or None.

    Raises:
        ValueError: the shapes differ, or AUC has no meaning because a class is missing from the test set.
    """
    if checkpoint.shape[1:] != random.shape[1:]:
        raise ValueError(f"the inits were scored on different test sets: {checkpoint.shape}, {random.shape}")
    images = checkpoint.shape[1]

    def both(counts: Floats) -> tuple[Floats, Floats]:
        if targets is None:
            return dice_table(checkpoint, counts), dice_table(random, counts)
        return auc_table(checkpoint, targets, counts), auc_table(random, targets, counts)

    seeds_a, seeds_b = (table[:, 0] for table in both(np.ones((1, images))))
    if np.isnan(seeds_a).any():
        raise ValueError("the test set holds one class only, so it has no AUC")
    blocks = [both(counts) for counts in resample_counts(images, groups, resamples=resamples, seed=seed)]
    draws_a = np.concatenate([a.mean(axis=0) for a, _ in blocks])
    draws_b = np.concatenate([b.mean(axis=0) for _, b in blocks])
    return Comparison(
        _interval(seeds_a.mean(), draws_a, level),
        _interval(seeds_b.mean(), draws_b, level),
        _interval(seeds_a.mean() - seeds_b.mean(), draws_a - draws_b, level),
        tuple(seeds_a.tolist()),
        tuple(seeds_b.tolist()),
    )


def _interval(value: float, draws: Floats, level: float) -> Interval:
    """Percentile interval; resamples in which the statistic does not exist are left out."""
    draws = draws[~np.isnan(draws)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) if len(draws) else (value, value)
    return Interval(float(value), float(low), float(high))
