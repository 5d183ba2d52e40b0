"""Batches for the training loop: seeded order, augmentation on the device; what a split of images must offer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
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


def seeded(*parts: str | int) -> torch.Generator:
    """A CPU generator whose draws are a function of `parts` only."""
    digest = hashlib.sha256(canonical_json(list(parts))).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


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


def order(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Index]:
    """Endless batches of indices below `n`: one permutation after another, cut into `batch_size`."""
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < batch_size:
            left = torch.cat([left, torch.randperm(n, generator=generator)])
        yield left[:batch_size].numpy()
        left = left[batch_size:]


def sampled(
    fetch: Fetch, n: int, *, batch_size: int, generator: torch.Generator, size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless augmented batches for `fit`: grey float (b, 1, size, size) in 0..1, and targets, on `device`.

    Args:
        fetch: images uint8 (b, h, w) and targets of some indices; targets uint8 (b, h, w) in 0..1 are masks: they move
            with their images and come out as float (b, size, size).
        n: number of images that `fetch` knows.
    """
    for index in order(n, batch_size, generator):
        images, targets = (torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in fetch(index))
        grey = scaled(images, size)
        if targets.dim() == 3:
            moved = augment(torch.cat([grey, scaled(targets, size) * 255.0], dim=1), generator)
            yield moved[:, :1], moved[:, 1]
        else:
            yield augment(grey, generator), targets
