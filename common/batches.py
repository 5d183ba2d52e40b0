"""Batches for the training loop: seeded order, augmentation on the device; what a split of images must offer."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from rin.common.backbones import scaled
from rin.common.files import canonical_json

Index = npt.NDArray[np.int64]
Fetch = Callable[[Index], tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]]


class Data(Protocol):
    """One split of a site's images."""

    def __len__(self) -> int: ...

    def batch(self, index: Index) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Grey images uint8 (b, h, w) and labels bool (b, n_labels), in the order of `index`."""
        ...


def seed_of(*parts: str | int) -> int:
    """A seed below 2**63 that is a function of `parts` only."""
    digest = hashlib.sha256(canonical_json(list(parts))).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded(*parts: str | int) -> torch.Generator:
    """A CPU generator whose draws are a function of `parts` only."""
    return torch.Generator().manual_seed(seed_of(*parts))


def augment(stack: Tensor, generator: torch.Generator) -> Tensor:
    """Flip left-right, shift by whole pixels up to 1/16 of the side, scale the brightness of the first channel.

    Pixels are moved, never interpolated, and black stays black: a network that is trained on smoother or brighter
    images than it is shown later has the wrong statistics in its batch norms.

    Args:
        stack: float (b, c, s, s); the first channel is the image in 0..1, others (masks) only move with it.
        generator: on the CPU, so that every device draws alike.
    """
    count, _, side, _ = stack.shape
    most = side // 16
    draws = torch.rand(count, 4, generator=generator).to(stack.device)
    shift = ((2 * most + 1) * draws[:, :2]).long()  # 0 to 2 * most: where the window begins in the padded image
    along = torch.arange(side, device=stack.device)
    across = torch.where(draws[:, 2:3] < 0.5, along, along.flip(0))
    rows, columns = shift[:, :1] + along, shift[:, 1:] + across
    image = torch.arange(count, device=stack.device)[:, None, None]
    moved = F.pad(stack, [most] * 4).movedim(1, -1)[image, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    bright = (moved[:, :1] * (0.85 + 0.3 * draws[:, 3]).view(-1, 1, 1, 1)).clamp(max=1.0)
    return torch.cat([bright, moved[:, 1:]], dim=1) if moved.shape[1] > 1 else bright


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
    n: int,
    first: int = 0,
    *,
    batch_size: int,
    key: tuple[str | int, ...],
    size: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless augmented batches for `fit`: grey float (b, 1, size, size) in 0..1, and targets, on `device`.

    Args:
        fetch: images uint8 (b, h, w) and targets of some indices; targets uint8 (b, h, w) in 0..1 are masks: they move
            with their images and come out as float (b, size, size). Called in a thread.
        n: number of images that `fetch` knows.
        first: number of the batch to begin with.
        key: every batch is a function of it and of its own number.
    """
    for step, (images, targets) in enumerate(ahead(fetch, Order(n, batch_size, key), first), first):
        generator = seeded(*key, "augment", step)
        grey = scaled(images.to(device, non_blocking=True), size)
        targets = targets.to(device, non_blocking=True)
        if targets.dim() == 3:
            moved = augment(torch.cat([grey, scaled(targets, size) * 255.0], dim=1), generator)
            yield moved[:, :1], moved[:, 1]
        else:
            yield augment(grey, generator), targets
