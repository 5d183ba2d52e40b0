"""Measures of a network's output: counts that sites may add up, AUC within modality and anatomy, Dice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from rin.common.disclosure import Outcomes
from rin.common.labels import label_set

MIN_CASES: Final = 10  # positives, and negatives, below which an AUC is left out


def top_counts(logits: npt.NDArray[np.floating], labels: npt.NDArray[np.bool_], rows: Sequence[int]) -> dict[str, int]:
    """How many images have one of their labels first, and among the first five, of the declared rows.

    Args:
        logits: (n, n_labels).
        labels: bool (n, n_labels).
        rows: declared head rows.

    Returns:
        Counts `top1`, `top5`, `images`.
    """
    columns = np.asarray(rows, dtype=np.int64)
    place = _places(logits[:, columns], labels[:, columns])
    return {"top1": int((place < 1).sum()), "top5": int((place < 5).sum()), "images": len(logits)}


def _places(logits: npt.NDArray[np.floating], labels: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """(n,) how many columns stand before the first right one, by falling logit, then by column; all without any."""
    right = np.where(labels, logits, -np.inf)
    first = right.argmax(1)[:, None]
    best = np.take_along_axis(logits, first, axis=1)
    before = (logits > best) | ((logits == best) & (np.arange(logits.shape[1]) < first))
    return np.where(labels.any(1), before.sum(1), logits.shape[1])


def outcomes(
    logits: npt.NDArray[np.floating],
    labels: npt.NDArray[np.bool_],
    rows: Sequence[int],
    patient: npt.NDArray[np.int64],
) -> Outcomes:
    """What a network said about each image, among the declared rows.

    Args:
        logits: (n, n_labels).
        labels: bool (n, n_labels), a declared one in every row.
        rows: declared head rows.
        patient: (n,), the patient of each image.
    """
    columns = np.asarray(rows, dtype=np.int64)
    declared, known = logits[:, columns], np.zeros_like(labels)
    known[:, columns] = labels[:, columns]
    return Outcomes(known, columns[declared.argmax(1)], _places(declared, labels[:, columns]), patient, tuple(rows))


def log_softmax(logits: npt.NDArray[np.floating], rows: Sequence[int]) -> npt.NDArray[np.float64]:
    """Logarithm of the softmax over the declared `rows`: float64 (n, n_labels), minus infinity in the others."""
    found = np.full(logits.shape, -np.inf)
    columns = np.asarray(rows, dtype=np.int64)
    chosen = logits[:, columns].astype(np.float64)
    found[:, columns] = chosen - np.logaddexp.reduce(chosen, axis=1, keepdims=True)
    return found


@dataclass(frozen=True, slots=True)
class MacroAuc:
    """AUC by head row, and their mean (NaN without any)."""

    by_row: dict[int, float]

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.by_row.values()))) if self.by_row else float("nan")


def macro_auc(
    scores: npt.NDArray[np.floating], labels: npt.NDArray[np.bool_], *, min_cases: int = MIN_CASES
) -> MacroAuc:
    """AUC of each label against the images of its own modality and anatomy, so that telling CT from MR earns nothing.

    Args:
        scores: (n, 165), higher means more likely.
        labels: bool (n, 165), columns in head-row order.
        min_cases: labels with fewer positives or negatives are left out.
    """
    by_row: dict[int, float] = {}
    groups: dict[tuple[str, str], list[int]] = {}
    for label in label_set():
        groups.setdefault((label.modality, label.anatomy), []).append(label.index)
    for group in groups.values():
        members = labels[:, group].any(1)
        for row in group:
            positive = labels[members, row]
            if min(int(positive.sum()), int((~positive).sum())) >= min_cases:
                by_row[row] = auc(scores[members, row], positive)
    return MacroAuc(dict(sorted(by_row.items())))


def auc(scores: npt.NDArray[np.floating], positive: npt.NDArray[np.bool_]) -> float:
    """Area under the ROC curve of `scores` (n,) for bool `positive` (n,), both kinds present; ties count one half."""
    above, below = scores[positive], np.sort(scores[~positive])
    pairs = np.searchsorted(below, above, "left").sum() + np.searchsorted(below, above, "right").sum()
    return float(pairs) / (2 * len(above) * len(below))


def dice(predicted: npt.NDArray[np.bool_], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Dice coefficient of each image, 2|A and B| / (|A| + |B|); two empty masks agree (1).

    Args:
        predicted, mask: bool (n, h, w).

    Returns:
        float64 (n,) in 0..1.
    """
    axes = tuple(range(1, predicted.ndim))
    both = (predicted & mask).sum(axes)
    total = predicted.sum(axes) + mask.sum(axes)
    return np.where(total == 0, 1.0, 2.0 * both / np.maximum(total, 1))
