"""Validation figures of a consortium: the sites' counts added up in site-name order, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from rin.common.scores import Few, GroupScores, groups, interval

COLUMNS: Final = ("modality, anatomy", "images", "top-1", "top-5", "balanced accuracy", "labels", "mean AUC")


@dataclass(frozen=True, slots=True)
class Share:
    """`right` of `of` images; of `rough` of them it was only said that few or most are right: taken as none or all."""

    right: int
    of: int
    rough: int = 0

    @property
    def value(self) -> float:
        return self.right / self.of


@dataclass(frozen=True, slots=True)
class Recall:
    """One label: `right` of `of` images were recognised, and nobody but the sites knows how many of `withheld` more."""

    row: int
    right: int
    of: int
    withheld: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """A mean of shares of which some are not known one by one: it lies between `low` and `high`.

    `value` takes those that a site withheld as all alike; where nothing is withheld, the three are equal. Where a site
    only says that few or most of a group are right, they count as none or all.
    """

    low: float
    value: float
    high: float


@dataclass(frozen=True, slots=True)
class GroupFigures:
    """One modality and anatomy over the sites that sent figures of it.

    Each sum is over the sites that sent both of its parts, so that a share is one of the same images.

    Attributes:
        sites: who sent any.
        images: their held-out images.
        top1, top5: None where every site withheld them.
        labels: labels of the group that those sites declare.
        recalls: of those labels that a site said the number of images of; the others are left out.
        balanced: balanced accuracy (mean recall) over `recalls`.
        cells: (true row, predicted row, images) of misses among the images that are not withheld.
        auc: (row, mean over sites of their AUC, by the plan's weights).
    """

    modality: str
    anatomy: str
    sites: tuple[str, ...]
    images: int
    top1: Share | None
    top5: Share | None
    labels: int
    recalls: tuple[Recall, ...]
    balanced: Bounds | None
    cells: tuple[tuple[int, int, int], ...]
    auc: tuple[tuple[int, float], ...]

    @property
    def name(self) -> str:
        return f"{self.modality} {self.anatomy}"

    @property
    def macro_auc(self) -> float | None:
        """Mean over the rows in `auc`."""
        return _mean([area for _, area in self.auc])


@dataclass(frozen=True, slots=True)
class Validation:
    """The figures of one round: those of the weights that it started from."""

    groups: tuple[GroupFigures, ...]

    @property
    def images(self) -> int:
        return sum(group.images for group in self.groups)

    @property
    def top1(self) -> Share | None:
        return _sum([group.top1 for group in self.groups])

    @property
    def top5(self) -> Share | None:
        return _sum([group.top5 for group in self.groups])

    @property
    def balanced(self) -> Bounds | None:
        """Mean recall over the labels of all groups."""
        known = [(len(group.recalls), group.balanced) for group in self.groups if group.balanced]
        total = sum(count for count, _ in known)
        sums = zip(*((n * b.low, n * b.value, n * b.high) for n, b in known), strict=True)
        return Bounds(*(sum(part) / total for part in sums)) if known else None

    @property
    def macro_auc(self) -> float | None:
        return _mean([area for group in self.groups for _, area in group.auc])


def table(validation: Validation) -> list[tuple[str, ...]]:
    """The cells under `COLUMNS` for people: a row a modality and anatomy, the last row for all together."""
    rows = [_cells(group.name, group, group.labels, len(group.recalls)) for group in validation.groups]
    labels, known = (sum(part) for part in zip(*((g.labels, len(g.recalls)) for g in validation.groups), strict=True))
    return [*rows, _cells("all", validation, labels, known)] if len(rows) > 1 else rows


def _cells(name: str, figures: GroupFigures | Validation, labels: int, known: int) -> tuple[str, ...]:
    area = figures.macro_auc
    return (
        name,
        f"{figures.images:,}",
        _percent(figures.top1),
        _percent(figures.top5),
        _between(figures.balanced),
        f"{known} of {labels}",
        "withheld" if area is None else f"{area:.3f}",
    )


def _percent(share: Share | None) -> str:
    """With a sign before it where a part is only known to be few or most."""
    return "withheld" if share is None else f"{'≈ ' if share.rough else ''}{100 * share.value:.1f} %"


def _between(mean: Bounds | None) -> str:
    if mean is None:
        return "withheld"
    low, value, high = (f"{100 * each:.1f}" for each in (mean.low, mean.value, mean.high))
    return f"{value} %" if low == high else f"{value} % ({low} to {high})"


def summed(
    scores: Mapping[str, Sequence[GroupScores]], declared: Mapping[str, Sequence[int]], weights: Mapping[str, float]
) -> Validation | None:
    """Figures of the sites' `scores`, groups in head-row order; None where no site sent any.

    Args:
        declared: site to its declared head rows.
        weights: site to its weight in the plan.
    """
    found = []
    for group, labels in groups().items():
        sent = {site: each for site in sorted(scores) for each in scores[site] if each.group == group}
        if sent:
            rows = {label.index for label in labels} & {row for site in sent for row in declared[site]}
            found.append(_figures(sent, len(rows), weights))
    return Validation(tuple(found)) if found else None


def _figures(sent: Mapping[str, GroupScores], labels: int, weights: Mapping[str, float]) -> GroupFigures:
    every = list(sent.values())
    cells: dict[tuple[int, int], int] = {}
    for each in every:
        for true, predicted, count in each.cells:
            cells[true, predicted] = cells.get((true, predicted), 0) + count
    recalls = _recalls(every)
    return GroupFigures(
        modality=every[0].modality,
        anatomy=every[0].anatomy,
        sites=tuple(sent),
        images=sum(each.images for each in every),
        top1=_sum([_share(each.top1, each.images) for each in every]),
        top5=_sum([_share(each.top5, each.images) for each in every]),
        labels=labels,
        recalls=recalls,
        balanced=_balanced(every, {each.row: each.of for each in recalls}),
        cells=tuple((*place, cells[place]) for place in sorted(cells)),
        auc=_weighted({site: dict(each.auc) for site, each in sent.items()}, weights),
    )


def _recalls(every: Sequence[GroupScores]) -> tuple[Recall, ...]:
    found: dict[int, Recall] = {}
    for each in every:
        hits = {row: count for row, count in each.hits if isinstance(count, int)}
        for row, count in each.positives if each.top1 is not None else ():
            known = found.get(row, Recall(row, 0, 0, 0))
            withheld = 0 if row in hits else count
            found[row] = Recall(row, known.right + hits.get(row, 0), known.of + count, known.withheld + withheld)
    return tuple(found[row] for row in sorted(found))


def _balanced(every: Sequence[GroupScores], images: Mapping[int, int]) -> Bounds | None:
    """Mean recall; of the hits that a site withholds by label, their sum is known, and in what range each lies.

    Args:
        images: row to its images at all sites.
    """
    low = value = high = 0.0
    for each in every:
        top1 = _share(each.top1, each.images)
        if top1 is None or not each.positives:
            continue
        said = dict(each.hits)
        parts = [_Part(1 / images[row], *interval(said.get(row), own)) for row, own in each.positives]
        parts.append(_Part(0.0, 0, each.images - sum(own for _, own in each.positives)))  # of labels left out
        parts.sort(key=lambda part: part.weight)
        hits = top1.right - sum(part.least for part in parts)  # to be given to some part, beyond its least
        room = sum(part.most - part.least for part in parts)
        low += _filled(parts, hits)
        high += _filled(parts[::-1], hits)
        alike = min(1.0, max(0.0, hits / room)) if room else 0.0
        value += sum(part.weight * (part.least + alike * (part.most - part.least)) for part in parts)
    return Bounds(low / len(images), value / len(images), high / len(images)) if images else None


class _Part(NamedTuple):
    """A site's images of one label: between `least` and `most` are hits, and each adds `weight` to a sum of recalls."""

    weight: float
    least: int
    most: int


def _filled(parts: Sequence[_Part], hits: int) -> float:
    """The sum of recalls if `hits` beyond the least go to `parts` in this order, each as far as it can take them."""
    found = 0.0
    for part in parts:
        more = min(part.most - part.least, max(0, hits))
        found, hits = found + part.weight * (part.least + more), hits - more
    return found


def _weighted(areas: Mapping[str, Mapping[int, float]], weights: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """The mean of each row over the sites that have it."""
    found = []
    for row in sorted({row for own in areas.values() for row in own}):
        sites = [site for site in areas if row in areas[site]]
        total = sum(weights[site] for site in sites)
        found.append((row, sum(weights[site] * areas[site][row] for site in sites) / total))
    return tuple(found)


def _sum(shares: Sequence[Share | None]) -> Share | None:
    known = [share for share in shares if share is not None]
    if not known:
        return None
    return Share(sum(s.right for s in known), sum(s.of for s in known), sum(s.rough for s in known))


def _share(count: int | Few | None, images: int) -> Share | None:
    words = {None: None, "few": Share(0, images, images), "most": Share(images, images, images)}
    return Share(count, images) if isinstance(count, int) else words[count]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
