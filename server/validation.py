"""Validation figures of a consortium: the sites' counts added up in site-name order, and what they come to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rin.common.scores import Few, GroupScores, groups


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
        hits = dict(each.hits)
        for row, count in each.positives if each.top1 is not None else ():
            known = found.get(row, Recall(row, 0, 0, 0))
            withheld = 0 if row in hits else count
            found[row] = Recall(row, known.right + hits.get(row, 0), known.of + count, known.withheld + withheld)
    return tuple(found[row] for row in sorted(found))


def _balanced(every: Sequence[GroupScores], images: Mapping[int, int]) -> Bounds | None:
    """Mean recall; of the hits that a site withholds by label, their sum is known, and no label has more than images.

    Args:
        images: row to its images at all sites.
    """
    low = value = high = 0.0
    for each in every if images else ():
        top1 = _share(each.top1, each.images)
        if top1 is None:
            continue
        hits, positives = dict(each.hits), dict(each.positives)
        sure = sum(count / images[row] for row, count in each.hits)
        rest = each.images - sum(positives[row] for row in hits)  # images in which the withheld hits are
        withheld = max(0, top1.right - sum(hits.values()))
        kept = sorted((images[row], positives[row]) for row in positives if row not in hits)
        elsewhere = each.images - sum(positives.values())  # images of labels that are left out
        low += sure + _filled(reversed(kept), max(0, withheld - elsewhere))
        high += sure + _filled(kept, withheld)
        value += sure + sum(min(1.0, withheld / rest) * own / total for total, own in kept)
    return Bounds(low / len(images), value / len(images), high / len(images)) if images else None


def _filled(kept: Iterable[tuple[int, int]], hits: int) -> float:
    """Sum of the shares if `hits` go to the labels of `kept`, (images at all sites, here), in this order."""
    found = 0.0
    for total, own in kept:
        found, hits = found + min(own, hits) / total, max(0, hits - own)
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
