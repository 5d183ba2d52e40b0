import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rin.common.batches import Balanced, Order, mixed, sampled
from rin.common.heads import Multi, Single
from rin.common.plan import Augment

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Named:
    """What `Balanced` asks of a split: its labels."""

    label_offsets: np.ndarray
    label_indices: np.ndarray

    def __len__(self) -> int:
        return len(self.label_offsets) - 1

    def batch(self, index: np.ndarray) -> Any:
        raise NotImplementedError


def test_order_visits_everything_once_an_epoch() -> None:
    order = Order(10, 4, ("x",))
    seen = np.concatenate([order(step) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:])
    assert np.array_equal(Order(10, 4, ("x",))(3), seen[12:16])  # a batch does not need the ones before it
    assert np.array_equal(Order(3, 8, ("x",))(0)[:6], np.concatenate([Order(3, 3, ("x",))(i) for i in range(2)]))


def test_sampled_gives_masks_as_soft_targets() -> None:
    pixels = np.full((6, 64, 64), 128, np.uint8)
    masks = np.zeros((6, 64, 64), np.uint8)
    masks[:, 16:48, 16:48] = 1
    images, targets = next(
        iter(
            sampled(
                lambda i: (pixels[i], masks[i]), Order(6, 4, (0,)), key=(0,), size=32, device=CPU, options=Augment()
            )
        )
    )
    assert images.shape == (4, 1, 32, 32)
    assert targets.shape == (4, 32, 32)
    assert targets.mean() == pytest.approx(0.25, abs=0.08)
    assert 0 <= targets.min() <= targets.max() <= 1.00001


def test_balanced_draws_every_label_equally_often() -> None:
    # 96 images of label 3, three of 7, one of both; label 5 has none.
    offsets = np.concatenate([np.arange(100), [101]])
    indices = np.array([3] * 96 + [7] * 3 + [3, 7])
    order = Balanced(Named(offsets, indices), 8, ("x",))
    seen = np.concatenate([order(step) for step in range(250)])
    assert seen.dtype == np.int64 and order(7).shape == (8,)
    assert 0.45 < np.isin(seen, [96, 97, 98, 99]).mean() < 0.55
    counts = np.bincount(seen, minlength=100)
    assert counts.min() >= 1 and counts[96:99].min() > 200 and counts[:96].max() < 30
    assert np.array_equal(Balanced(Named(offsets, indices), 8, ("x",))(33), order(33))
    assert not np.array_equal(order(33), order(34))


def plain(first: int) -> Any:
    for step in itertools.count(first):
        labels = torch.zeros(6, 5, dtype=torch.bool)
        labels[torch.arange(6), (torch.arange(6) + step) % 4] = True
        yield torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(step)), labels


@pytest.mark.parametrize("goal", [Single((0, 1, 2, 3)), Multi((0, 1, 2, 3), (1, 2))])
def test_a_mixture_of_images_has_the_same_mixture_of_losses(goal: Single | Multi) -> None:
    stream = mixed(plain, goal.soft, 0.4, ("x",))(5)
    (images, targets), (before, labels) = next(iter(stream)), next(plain(5))
    shares = ((images - before.roll(1, 0)) / (before - before.roll(1, 0))).flatten(1).median(1).values
    assert 0 <= shares.min() < shares.max() <= 1 + 1e-5
    assert len({round(float(share), 3) for share in shares}) > 3
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))

    def each(labels: Tensor) -> Tensor:
        """Sum of the loss of every image."""
        found = [goal(logits[i : i + 1], labels[i : i + 1]) * goal.count(labels[i : i + 1]) for i in range(6)]
        return torch.stack(found)

    expected = (shares * each(labels) + (1 - shares) * each(labels.roll(1, 0))).sum() / goal.count(targets)
    torch.testing.assert_close(goal(logits, targets), expected, rtol=1e-4, atol=1e-5)


def test_a_mixture_is_a_function_of_its_step() -> None:
    soft = Single((0, 1, 2, 3)).soft
    seen = list(itertools.islice(mixed(plain, soft, 0.4, ("x",))(0), 4))
    again = next(iter(mixed(plain, soft, 0.4, ("x",))(3)))
    assert torch.equal(seen[3][0], again[0]) and torch.equal(seen[3][1], again[1])
    other = next(iter(mixed(plain, soft, 0.4, ("y",))(3)))
    assert not torch.equal(other[0], again[0])
