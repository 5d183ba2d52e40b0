"""Validation figures of one site, as they travel: counts by modality and anatomy that a coordinator may add up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from rin.common.labels import Label, label_set

SMALLEST_CELL: Final = 10  # patients, and so images; a smaller cell never leaves a site (threat T6)
MAX_CELLS: Final = 768  # of all confusion matrices of one manifest, which must fit into an HTTP header
DIGITS: Final = 4  # significant digits of a figure that leaves
_MOST: Final = 1_000_000_000

Count = Annotated[int, Field(ge=SMALLEST_CELL, le=_MOST)]
Few = Literal["few", "most"]  # fewer than `SMALLEST_CELL` images; all but fewer than that
Row = Annotated[int, Field(ge=0, lt=4096)]
Rows = Annotated[tuple[tuple[Row, Count], ...], Field(max_length=4096)]


class GroupScores(BaseModel):
    """One modality and anatomy. What is absent is withheld; nothing here says whether it is zero or only small.

    An image counts in every group whose labels it carries, and within a group under one true row: the predicted one
    if the image carries it, else its lowest. It is a hit if its predicted row is any of its labels.

    Attributes:
        images: held-out images with a declared label of the group.
        top1, top5: those with one of their labels first, and among the first five, of the declared rows.
        positives: (true row, images), rows ascending.
        hits: the same of the hits, of some of those rows; what is left of the positives are the misses.
        cells: (true row, predicted row, images) of misses in the rows whose hits are a number, ascending.
        auc: (row, area under the ROC curve within the group).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    modality: Annotated[str, Field(pattern=r"^[A-Za-z]{1,16}$")]
    anatomy: Annotated[str, Field(pattern=r"^[A-Za-z]{1,16}$")]
    images: Count
    top1: Count | Few | None = None
    top5: Count | Few | None = None
    positives: Rows = ()
    hits: Annotated[tuple[tuple[Row, Count | Few], ...], Field(max_length=4096)] = ()
    cells: Annotated[tuple[tuple[Row, Row, Count], ...], Field(max_length=MAX_CELLS)] = ()
    auc: Annotated[tuple[tuple[Row, Annotated[float, Field(ge=0, le=1)]], ...], Field(max_length=4096)] = ()

    @property
    def group(self) -> tuple[str, str]:
        return (self.modality, self.anatomy)

    def rounded(self) -> Self:
        """The same to `DIGITS` significant digits: what may leave."""
        return self.model_copy(
            update={
                "images": significant(self.images),
                "top1": significant(self.top1) if isinstance(self.top1, int) else self.top1,
                "top5": significant(self.top5) if isinstance(self.top5, int) else self.top5,
                "positives": tuple((row, significant(count)) for row, count in self.positives),
                "hits": tuple((row, significant(n) if isinstance(n, int) else n) for row, n in self.hits),
                "cells": tuple((true, predicted, significant(count)) for true, predicted, count in self.cells),
                "auc": tuple((row, float(f"{area:.{DIGITS}g}")) for row, area in self.auc),
            }
        )


def interval(count: int | Few | None, images: int) -> tuple[int, int]:
    """The least and the most of `images` that `count`, as it is sent, can be."""
    if isinstance(count, int):
        return count, count
    small = min(images, SMALLEST_CELL - 1)
    return {"few": (0, small), "most": (images - small, images), None: (0, images)}[count]


def significant(count: int) -> int:
    """`count` to `DIGITS` significant digits."""
    return int(float(f"{count:.{DIGITS}g}"))


def groups() -> dict[tuple[str, str], tuple[Label, ...]]:
    """The labels of each (modality, anatomy), both in head-row order."""
    found: dict[tuple[str, str], list[Label]] = {}
    for label in label_set():
        found.setdefault((label.modality, label.anatomy), []).append(label)
    return {group: tuple(labels) for group, labels in found.items()}


def fault(scores: Sequence[GroupScores], declared: Iterable[int]) -> str:
    """Why `scores` cannot be those of a site that declares the rows `declared`; empty if they can.

    Sums are compared with a slack for the rounding of their parts.
    """
    known, rows = groups(), set(declared)
    if len({each.group for each in scores}) != len(scores):
        return "a modality and anatomy comes twice"
    if sum(len(each.cells) for each in scores) > MAX_CELLS:
        return "too many confusion cells"
    for each in scores:
        if each.group not in known:
            return "a modality and anatomy that the label set does not know"
        own = {label.index for label in known[each.group]} & rows
        if not _named(each, own, rows):
            return "rows that are not declared, out of order, or of another anatomy"
        if not _adds_up(each):
            return "counts that do not add up"
    return ""


def _named(each: GroupScores, own: set[int], rows: set[int]) -> bool:
    columns = [[row for row, _ in part] for part in (each.positives, each.hits, each.auc)]
    places = [(true, predicted) for true, predicted, _ in each.cells]
    ascending = all(column == sorted(set(column)) for column in columns) and places == sorted(set(places))
    known = all(own.issuperset(column) for column in columns)
    cells = all(true in own and predicted in rows and true != predicted for true, predicted in places)
    return ascending and known and cells


def _adds_up(each: GroupScores) -> bool:
    slack = 2 * 10.0 ** (1 - DIGITS) * each.images if each.images >= 10**DIGITS else 0.0
    positives = dict(each.positives)
    hits = {row: count for row, count in each.hits if isinstance(count, int)}
    top1 = each.top1 if isinstance(each.top1, int) else 0
    top5 = each.top5 if isinstance(each.top5, int) else each.images
    misses = {row: positives.get(row, 0) - count for row, count in hits.items()}
    left = dict(misses)
    for true, _, count in each.cells:
        left[true] = left.get(true, -count) - count
    return (
        top1 <= top5 <= each.images
        and all(row in positives for row, _ in each.hits)
        and sum(positives.values()) <= each.images + slack
        and sum(hits.values()) <= top1 + slack
        and sum(misses.values()) <= each.images - top1 + slack
        and all(count >= 0 for count in misses.values())
        and all(count >= -slack for count in left.values())
    )
