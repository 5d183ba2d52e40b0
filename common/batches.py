"""Batches for the training loop: seeded order, reading ahead, mixup; what a split of images must offer."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rin.common.augment import Kinds, augment
from rin.common.backbones import scaled
from rin.common.files import canonical_json
from rin.common.plan import Augment

Index = npt.NDArray[np.int64]
Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]  # the batches from a step on
Fetch = Callable[[Index], tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]]


class Data(Protocol):
    """One split of a site's images."""

    def __len__(self) -> int: ...

    def batch(self, index: Index) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Grey images uint8 (b, h, w) and labels bool (b, n_labels), in the order of `index`."""
        ...


@runtime_checkable
class Labelled(Data, Protocol):
    """A split that knows its labels without reading an image."""

    @property
    def label_offsets(self) -> Index:
        """(n + 1,) into `label_indices`, where the labels of each image begin."""
        ...

    @property
    def label_indices(self) -> Index:
        """Head rows of the images' declared labels, one image after the other."""
        ...


def seed_of(*parts: str | int) -> int:
    """A seed below 2**63 that is a function of `parts` only."""
    digest = hashlib.sha256(canonical_json(list(parts))).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded(*parts: str | int) -> torch.Generator:
    """A CPU generator whose draws are a function of `parts` only."""
    return torch.Generator().manual_seed(seed_of(*parts))


@dataclass(frozen=True, slots=True)
class Order:
    """Endless batches of indices below `n`: one permutation after another, cut into `batch_size`.

    Every batch is a function of `key` and its number alone, so that training goes on anywhere without replaying.
    """

    n: int
    batch_size: int
    key: tuple[str | int, ...]
    _last: dict[int, Index] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, step: int) -> Index:
        """Indices int64 (batch_size,) of the batch `step`, from 0."""
        first, parts, missing = step * self.batch_size, [], self.batch_size
        while missing:
            epoch, at = divmod(first, self.n)
            parts.append(self._permutation(epoch)[at : at + missing])
            first, missing = first + len(parts[-1]), missing - len(parts[-1])
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> Index:
        if epoch not in self._last:
            self._last.clear()
            self._last[epoch] = torch.randperm(self.n, generator=seeded(*self.key, "epoch", epoch)).numpy()
        return self._last[epoch]


class Balanced:
    """Endless batches in which every label that occurs is drawn equally often: a label, then one of its images.

    Every batch is a function of `key` and its number alone.
    """

    def __init__(self, data: Labelled, batch_size: int, key: tuple[str | int, ...]) -> None:
        self._batch_size, self._key = batch_size, key
        images = np.repeat(np.arange(len(data)), np.diff(data.label_offsets))
        self._images = images[np.argsort(data.label_indices, kind="stable")]  # by label
        counts = np.bincount(data.label_indices)
        self._firsts, self._counts = (np.cumsum(counts) - counts)[counts > 0], counts[counts > 0]

    def __call__(self, step: int) -> Index:
        """Indices int64 (batch_size,) of the batch `step`, from 0; an image can be drawn twice."""
        draw = torch.rand(2, self._batch_size, generator=seeded(*self._key, "balanced", step), dtype=torch.float64)
        label = (draw[0].numpy() * len(self._counts)).astype(np.int64)
        return self._images[self._firsts[label] + (draw[1].numpy() * self._counts[label]).astype(np.int64)]


def ahead(fetch: Fetch, order: Callable[[int], Index], first: int, depth: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches from `first` on, read by a thread while the device computes, in page-locked memory beside a GPU."""
    pin = torch.cuda.is_available()

    def read(step: int) -> tuple[Tensor, Tensor]:
        images, targets = (torch.from_numpy(np.ascontiguousarray(part)) for part in fetch(order(step)))
        return (images.pin_memory(), targets.pin_memory()) if pin else (images, targets)

    with ThreadPoolExecutor(1, "batches") as thread:
        waiting = deque(thread.submit(read, first + i) for i in range(depth))
        try:
            for step in itertools.count(first + depth):
                found = waiting.popleft().result()
                waiting.append(thread.submit(read, step))
                yield found
        finally:
            for each in waiting:
                each.cancel()


def sampled(
    fetch: Fetch,
    order: Callable[[int], Index],
    first: int = 0,
    *,
    key: tuple[str | int, ...],
    size: int,
    device: torch.device,
    options: Augment,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless augmented batches for `fit`: grey float (b, 1, size, size) in 0..1, and targets, on `device`.

    Args:
        fetch: images uint8 (b, h, w) and targets of some indices. Bool targets (b, labels of the label set) say what
            the images are of, see `rin.common.augment`; uint8 ones (b, h, w) in 0..1 are masks: they move with their
            images and come out as float (b, size, size). Called in a thread.
        order: the indices of a batch, as a function of its number.
        first: number of the batch to begin with.
        key: every batch is a function of it and of its own number.
    """
    for step, (images, targets) in enumerate(ahead(fetch, order, first), first):
        generator = seeded(*key, "augment", step)
        grey = scaled(images.to(device, non_blocking=True), size)
        targets = targets.to(device, non_blocking=True)
        kinds = Kinds.of(targets) if targets.dtype == torch.bool else Kinds.unknown(len(grey), device)
        if targets.dim() == 3:
            moved = augment(torch.cat([grey, scaled(targets, size) * 255.0], dim=1), options, kinds, generator)
            yield moved[:, :1], moved[:, 1]
        else:
            yield augment(grey, options, kinds, generator), targets


def mixed(batches: Batches, soft: Callable[[Tensor], Tensor], alpha: float, key: tuple[str | int, ...]) -> Batches:
    """`batches`, each image mixed with its neighbour in the batch and their targets alike (mixup, Zhang et al. 2018).

    Args:
        soft: makes targets that can be mixed, see `rin.common.heads`.
        alpha: shares are drawn from Beta(alpha, alpha), one an image.
        key: a share is a function of it, of the batch's number and of the image's place.
    """

    def stream(first: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step, (images, labels) in enumerate(batches(first), first):
            drawn = np.random.default_rng(seed_of(*key, "mixup", step)).beta(alpha, alpha, len(images))
            share, targets = torch.from_numpy(drawn.astype(np.float32)).to(images.device), soft(labels)
            yield _mix(images, share), _mix(targets, share)

    return stream


def _mix(values: Tensor, share: Tensor) -> Tensor:
    return values.roll(1, 0).lerp(values, share.view(-1, *[1] * (values.dim() - 1)))
