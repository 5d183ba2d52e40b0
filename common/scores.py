"""Validation figures of one site, as they travel: counts by modality and anatomy that a coordinator may add up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field

from rin.common.labels import Label, label_set

SMALLEST_CELL: Final = 10  # patients, and so images; a smaller cell never leaves a site (threat T6)
MAX_CELLS: Final = 768  # of all confusion matrices of one manifest, which must fit into an HTTP header
DIGITS: Final = 4  # significant digits of a figure that leaves
_MOST: Final = 1_000_000_000

Count = Annotated[int, Field(ge=SMALLEST_CELL, le=_MOST)]
Row = Annotated[int, Field(ge=0, lt=4096)]
Rows = Annotated[tuple[tuple[Row, Count], ...], Field(max_length=4096)]


class GroupScores(BaseModel):
    """One modality and anatomy. What is absent is withheld; nothing here says whether it is zero or only small.

    An image counts in every group whose labels it carries, and within a group under one true row: the predicted one
    if the image carries it, else its lowest. It is a hit if its predicted row is any of its labels.

    Attributes:
        images: held-out images with a declared label of the group.
        top1, top5: those with one of their labels first, and among the first five, of the declared rows.
        hits, misses: (true row, images), rows ascending.
        cells: (true row, predicted row, images) of misses, ascending.
        auc: (row, area under the ROC curve within the group).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    modality: Annotated[str, Field(pattern=r"^[A-Za-z]{1,16}$")]
    anatomy: Annotated[str, Field(pattern=r"^[A-Za-z]{1,16}$")]
    images: Count
    top1: Count | None = None
    top5: Count | None = None
    hits: Rows = ()
    misses: Rows = ()
    cells: Annotated[tuple[tuple[Row, Row, Count], ...], Field(max_length=MAX_CELLS)] = ()
    auc: Annotated[tuple[tuple[Row, Annotated[float, Field(ge=0, le=1)]], ...], Field(max_length=4096)] = ()

    @property
    def group(self) -> tuple[str, str]:
        return (self.modality, self.anatomy)

    def rounded(self) -> Self:
        """The same to `DIGITS` significant digits: what may leave."""

        def short(rows: Rows) -> Rows:
            return tuple((row, significant(count)) for row, count in rows)

        return self.model_copy(
            update={
                "images": significant(self.images),
                "top1": significant(self.top1) if self.top1 else None,
                "top5": significant(self.top5) if self.top5 else None,
                "hits": short(self.hits),
                "misses": short(self.misses),
                "cells": tuple((true, predicted, significant(count)) for true, predicted, count in self.cells),
                "auc": tuple((row, float(f"{area:.{DIGITS}g}")) for row, area in self.auc),
            }
        )


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
    columns = [[row for row, _ in part] for part in (each.hits, each.misses, each.auc)]
    places = [(true, predicted) for true, predicted, _ in each.cells]
    ascending = all(column == sorted(set(column)) for column in columns) and places == sorted(set(places))
    known = all(own.issuperset(column) for column in columns)
    cells = all(true in own and predicted in rows and true != predicted for true, predicted in places)
    return ascending and known and cells


def _adds_up(each: GroupScores) -> bool:
    slack = 2 * 10.0 ** (1 - DIGITS) * each.images if each.images >= 10**DIGITS else 0.0
    if each.top1 is None and (each.hits or each.misses):
        return False
    top1 = each.top1 or 0
    misses = dict(each.misses)
    if any(true not in misses for true, _, _ in each.cells):
        return False
    kept = {true: sum(count for row, _, count in each.cells if row == true) for true in misses}
    return (
        top1 <= (each.top5 or each.images) <= each.images
        and sum(count for _, count in each.hits) <= top1 + slack
        and sum(misses.values()) <= each.images - top1 + slack
        and all(kept[row] <= count + slack for row, count in misses.items())
    )
