"""What a site may say about its held-out images: disjoint cells of at least ten patients, so nothing can be solved.

A count can be learnt without being sent: by subtracting others from a total. So a total is sent together with parts of
it only if what is left over is no small cell either: it is the one part that nobody can look into. The sets whose size
follows by adding and subtracting are unions of such parts, of ten patients or more. Top-5 parts the misses a second
time; of two ways to part one total, no crossing follows. A zero is a small cell: "nobody" beside "withheld" would tell
whether a patient is here. (Secondary suppression: Hundepool et al., Statistical Disclosure Control, 2012; threat T6.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rin.common.scores import MAX_CELLS, SMALLEST_CELL, Few, GroupScores, groups, interval

Index = npt.NDArray[np.int64]  # places of images, ascending
Cell = tuple[int, int, int]  # true row, predicted row, images


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What a network said about n held-out images.

    Args:
        labels: bool (n, n_labels), declared rows only, at least one in every row.
        predicted: int64 (n,), the declared head row with the highest output.
        place: int64 (n,), how many declared rows stand before the first that the image carries.
        patient: int64 (n,).
        rows: the declared head rows.
    """

    labels: npt.NDArray[np.bool_]
    predicted: npt.NDArray[np.int64]
    place: npt.NDArray[np.int64]
    patient: npt.NDArray[np.int64]
    rows: tuple[int, ...]


def published(outcomes: Outcomes, areas: Mapping[int, float], allowed: Set[Any]) -> tuple[GroupScores, ...]:
    """The figures of `outcomes` that may leave, rounded, by modality and anatomy.

    Args:
        areas: AUC by head row.
        allowed: of `validation`, `confusion` and `auc` what plan and site both allow; nothing without the first.
    """
    if "validation" not in allowed:
        return ()
    found = []
    for (modality, anatomy), labels in groups().items():
        own = [label.index for label in labels if label.index in outcomes.rows]
        group = _Group(outcomes, own)
        if group.enough(group.members):
            facts = group.counts(confusion="confusion" in allowed)
            auc = tuple((row, areas[row]) for row in own if row in areas and group.two_sided(row))
            facts["auc"] = auc if "auc" in allowed else ()
            found.append({"modality": modality, "anatomy": anatomy, **facts})
    largest = _largest([cell for facts in found for cell in facts["cells"]])
    return tuple(
        GroupScores(**facts | {"cells": tuple(cell for cell in facts["cells"] if cell in largest)}).rounded()
        for facts in found
    )


class _Group:
    """The images of one modality and anatomy, with a true row each; `own` are its declared rows."""

    def __init__(self, outcomes: Outcomes, own: list[int]) -> None:
        self.outcomes, self.own = outcomes, own
        mine = np.zeros_like(outcomes.labels)
        mine[:, own] = outcomes.labels[:, own]
        self.members: Index = np.flatnonzero(mine.any(1))
        carried = mine[np.arange(len(mine)), outcomes.predicted]
        self.truth = np.where(carried, outcomes.predicted, mine.argmax(1))

    def enough(self, images: Index) -> bool:
        """Whether `images` are no small cell."""
        return len(np.unique(self.outcomes.patient[images])) >= SMALLEST_CELL

    def two_sided(self, row: int) -> bool:
        positive = self.outcomes.labels[self.members, row]
        return self.enough(self.members[positive]) and self.enough(self.members[~positive])

    def counts(self, *, confusion: bool) -> dict[str, Any]:
        place = self.outcomes.place[self.members]
        hit, near, far = self.members[place == 0], self.members[(place > 0) & (place < 5)], self.members[place >= 5]
        facts: dict[str, Any] = {"images": len(self.members), "cells": (), **self._ranks(hit, near, far)}
        positives = self._parts(self.members, self.truth, self.own)
        facts["positives"] = _sizes(positives)
        if isinstance(facts["top1"], int):
            hits = self._hits(hit, positives)
            facts["hits"] = self._with_words(hit, positives, hits)
            if confusion:
                misses = {row: np.setdiff1d(positives[row], part) for row, part in hits.items()}
                facts["cells"] = tuple(self._cells(misses))
        return facts

    def _ranks(self, hit: Index, near: Index, far: Index) -> dict[str, int | Few | None]:
        """Top-1 and top-5; of up to five declared rows all images are within five, and of one all are hits."""
        images, rows = len(self.members), len(self.outcomes.rows)
        if rows == 1:
            return {"top1": images, "top5": images}
        top1 = self._size(hit)
        if rows <= 5:
            return {"top1": top1, "top5": images}
        top5 = self._size(np.union1d(hit, near))
        if isinstance(top1, int) and isinstance(top5, int) and not self.enough(near):
            top5 = None
        return {"top1": top1, "top5": top5}

    def _size(self, part: Index) -> int | Few | None:
        """How many of the group's images `part` are, in words where it or the rest is a small cell."""
        return len(part) if self._parted(self.members, part) else _word(len(part), len(self.members))

    def _hits(self, hit: Index, positives: Mapping[int, Index]) -> dict[int, Index]:
        """The hits that may be sent beside `positives` and their total; misses follow, so both must be enough."""
        hits = {row: np.intersect1d(part, hit) for row, part in positives.items()}
        kept = {row: part for row, part in hits.items() if self._parted(positives[row], part)}
        largest_first = sorted(kept, key=lambda row: (-len(positives[row]), row))
        while kept and len(kept) < len(self.own):
            sent = np.concatenate([positives[row] for row in kept])
            if self._parted(np.setdiff1d(self.members, sent), np.setdiff1d(hit, sent)):
                break
            del kept[largest_first.pop()]
        return kept

    def _with_words(
        self, hit: Index, positives: Mapping[int, Index], hits: Mapping[int, Index]
    ) -> tuple[tuple[int, int | Few], ...]:
        """`hits` as numbers, and as words for other rows; no word where words and numbers would give a number away."""
        sizes = {row: len(part) for row, part in positives.items()}
        others = {row: len(np.intersect1d(positives[row], hit)) for row in positives if row not in hits}
        said: dict[int, Few | None] = {row: _word(count, sizes[row]) for row, count in others.items()}
        numbers = {row: len(part) for row, part in hits.items()}
        total = len(hit) - sum(numbers.values())
        ranges = [interval(said[row], sizes[row]) for row in said]
        ranges.append((0, len(self.members) - sum(sizes.values())))  # of the rows that are not sent at all
        low, high = (sum(ends) for ends in zip(*ranges, strict=True))
        open_ended = all(
            min(most, total - (low - least)) > max(least, total - (high - most)) for least, most in ranges if most
        )
        words = {row: word for row, word in said.items() if word} if open_ended else {}
        return tuple(sorted({**numbers, **words}.items()))

    def _parted(self, images: Index, part: Index) -> bool:
        """Whether both `part` and the rest of `images` are enough."""
        return self.enough(part) and self.enough(np.setdiff1d(images, part))

    def _cells(self, misses: Mapping[int, Index]) -> Iterable[Cell]:
        for true, missed in misses.items():
            parts = self._parts(missed, self.outcomes.predicted, [row for row in self.outcomes.rows if row != true])
            yield from ((true, row, count) for row, count in _sizes(parts))

    def _parts(self, images: Index, key: Index, rows: Sequence[int]) -> dict[int, Index]:
        """The parts of `images` by `key` that may be sent beside their number: what is left over is no small cell."""
        parts = {row: images[key[images] == row] for row in rows}
        kept = {row: part for row, part in parts.items() if self.enough(part)}
        largest_first = sorted(kept, key=lambda row: (-len(kept[row]), row))
        while kept and len(kept) < len(parts):
            if self.enough(np.concatenate([part for row, part in parts.items() if row not in kept])):
                break
            del kept[largest_first.pop()]
        return kept


def _word(part: int, images: int) -> Few | None:
    """Which side of `images` is small, unless both are or, with many images a patient, none is."""
    few, most = part < SMALLEST_CELL, images - part < SMALLEST_CELL
    return None if few == most else "few" if few else "most"


def _sizes(parts: Mapping[int, Index]) -> tuple[tuple[int, int], ...]:
    return tuple((row, len(images)) for row, images in sorted(parts.items()))


def _largest(cells: list[Cell]) -> set[Cell]:
    """The `MAX_CELLS` largest confusion cells; the others join what is left over of their rows."""
    return set(sorted(cells, key=lambda cell: (-cell[2], cell))[:MAX_CELLS])
