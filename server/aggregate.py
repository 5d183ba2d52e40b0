"""From receipts to the mean update: checked, clipped, weighted, read block by block so that no model is held a site."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from rin.common.errors import RefusedError
from rin.common.files import BLOCK
from rin.common.layout import Layout, Tensor

HEAD: Final = "head."  # tensors whose first dimension is the head row
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Inspected:
    """What one pass over an update finds: digest of its tensor bytes, L2 norm over its parameters."""

    digest: str
    norm: float


@dataclass(frozen=True, slots=True)
class Contribution:
    """One site's counted update. `scale` is at most 1: what clipping to the plan's norm leaves of it."""

    site: str
    path: Path
    weight: float
    labels: Collection[int]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Block:
    """The mean update of `len(mean)` elements of `tensor`, from its element `start` on; float64, one-dimensional."""

    tensor: Tensor
    start: int
    mean: Doubles


def inspect(path: Path, layout: Layout) -> Inspected:
    """Read the update at `path` once; its header has been compared when it arrived.

    Raises:
        RefusedError: update-not-finite.
    """
    sha, squares = hashlib.sha256(), 0.0
    with _File(path, layout) as file:
        for tensor in layout.tensors:
            for start, count in _pieces(tensor):
                values = file.read(tensor, start, count)
                sha.update(values.data)
                square = float(np.dot(doubles := values.astype(np.float64), doubles))
                if not math.isfinite(square):
                    raise RefusedError("update-not-finite")
                if tensor.kind == "parameter":
                    squares += square
    return Inspected(sha.hexdigest(), math.sqrt(squares))


def clip_scale(norm: float, limit: float) -> float:
    """The factor that brings `norm` down to `limit`; 1 where it is below."""
    return 1.0 if norm <= limit else limit / norm


def shares(weights: Mapping[str, float], max_share: float) -> dict[str, float]:
    """Shares in proportion to `weights`, none above `max_share`; what is cut off goes to the others in proportion.

    Where even equal shares are above `max_share`, they are equal.

    Returns:
        Site to share, in name order, summing to 1.
    """
    if max_share * len(weights) <= 1.0:
        return {site: 1.0 / len(weights) for site in sorted(weights)}
    capped: set[str] = set()
    while True:
        rest = {site: weights[site] for site in sorted(weights) if site not in capped}
        left, total = 1.0 - max_share * len(capped), math.fsum(rest.values())
        found = {site: left * weight / total for site, weight in rest.items()}
        over = {site for site, share in found.items() if share > max_share * (1 + 1e-12)}
        if not over:
            return {site: found.get(site, max_share) for site in sorted(weights)}
        capped |= over


def frozen_rows(contributions: Sequence[Contribution], n_rows: int, min_sites: int) -> npt.NDArray[np.int64]:
    """Head rows that fewer than `min_sites` of the contributions declare: they stay as they are (threat T8)."""
    count = np.zeros(n_rows, np.int64)
    for each in contributions:
        count[list(each.labels)] += 1
    return np.flatnonzero(count < min_sites)


def mean_update(
    contributions: Sequence[Contribution], layout: Layout, *, max_share: float, min_sites: int
) -> Iterator[Block]:
    """The weighted mean of the updates, block by block in the order of `layout`; every block is a new array.

    Sums are float64 and run over the sites in name order, so that the same receipts give the same bits. A head row is
    averaged over the sites that declare it, and is 0 where fewer than `min_sites` do.

    Args:
        contributions: whose files have passed `inspect`.
        max_share: largest share of one site, over all and in each head row.
    """
    ordered = sorted(contributions, key=lambda each: each.site)
    share = shares({each.site: each.weight for each in ordered}, max_share)
    files = [_File(each.path, layout) for each in ordered]
    try:
        for tensor in layout.tensors:
            if tensor.name.startswith(HEAD):
                factors = _row_factors(ordered, tensor.shape[0], max_share, min_sites)
                rows = _sum(files, tensor, 0, tensor.nbytes // 4, factors * _scales(ordered)[:, None])
                yield Block(tensor, 0, rows)
                continue
            factors = np.array([share[each.site] for each in ordered]) * _scales(ordered)
            for start, count in _pieces(tensor):
                yield Block(tensor, start, _sum(files, tensor, start, count, factors[:, None]))
    finally:
        for file in files:
            file.close()


def _scales(contributions: Sequence[Contribution]) -> Doubles:
    return np.array([each.scale for each in contributions])


def _row_factors(contributions: Sequence[Contribution], n_rows: int, max_share: float, min_sites: int) -> Doubles:
    """(sites, n_rows): the share of each site in each head row."""
    factors = np.zeros((len(contributions), n_rows))
    holders = [frozenset(i for i, each in enumerate(contributions) if row in each.labels) for row in range(n_rows)]
    for group in set(holders):
        if len(group) >= max(1, min_sites):
            found = shares({contributions[i].site: contributions[i].weight for i in group}, max_share)
            rows = [row for row in range(n_rows) if holders[row] == group]
            for i in group:
                factors[i, rows] = found[contributions[i].site]
    return factors


def _sum(files: Sequence[_File], tensor: Tensor, start: int, count: int, factors: Doubles) -> Doubles:
    """Sum over the sites of factor times values; factors (sites, k) are spread evenly over the `count` elements."""
    total = np.zeros(count)
    for file, factor in zip(files, factors, strict=True):
        values = file.read(tensor, start, count).astype(np.float64)
        total += (values.reshape(len(factor), -1) * factor[:, None]).reshape(-1)
    return total


def _pieces(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(first element, number of elements) of the blocks of `tensor`."""
    total, step = tensor.nbytes // 4, BLOCK // 4
    for start in range(0, total, step):
        yield start, min(step, total - start)


class _File:
    """An update, read with pread: pages that mmap would touch count as the process's memory."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self._path = path
        self._begin = len(layout.header())
        self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def read(self, tensor: Tensor, start: int, count: int) -> Floats:
        data = os.pread(self._fd, 4 * count, self._begin + tensor.offset + 4 * start)
        if len(data) != 4 * count:
            raise RefusedError("update-length")
        return np.frombuffer(data, "<f4")

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
