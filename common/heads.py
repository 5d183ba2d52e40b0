"""The two losses of the plan's target, taken over the labels that a site declares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]

TINY: Final = 1e-6  # no mean is taken over less


class Single:
    """Softmax cross-entropy over the declared head rows; the other rows get no gradient.

    The target is spread evenly over the declared labels of the image. `exhaustive_rows` has no meaning here: softmax
    says that exactly one label holds.

    Args:
        smoothing: share of every target that is spread over all declared rows (Szegedy et al. 2016, section 7).
        offsets: (rows,), added to the declared logits: tau x log prior is logit adjustment (Menon et al. 2021).
    """

    def __init__(
        self,
        rows: Sequence[int],
        exhaustive_rows: Sequence[int] = (),
        *,
        smoothing: float = 0.0,
        offsets: Tensor | None = None,
    ) -> None:
        self._columns, self._smoothing, self._offsets = torch.tensor(rows, dtype=torch.long), smoothing, offsets

    def soft(self, labels: Tensor) -> Tensor:
        """Targets float32 (b, rows) of bool labels (b, n_labels): a distribution an image, so they can be mixed."""
        target = labels.index_select(1, self._columns.to(labels.device)).to(torch.float32)
        target = target / target.sum(1, keepdim=True).clamp(min=1)
        return target * (1 - self._smoothing) + self._smoothing / len(self._columns) if self._smoothing else target

    def count(self, targets: Tensor) -> Tensor:
        """Number of images: what the mean is taken over."""
        return torch.full((), float(len(targets)), device=targets.device)

    def right(self, targets: Tensor) -> Tensor:
        """Which declared rows (b, rows) are an image's label; of a mixture, the one with the largest share."""
        return _largest(targets if targets.is_floating_point() else self.soft(targets))

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch; logits (b, n_labels), targets `soft` or labels with a declared one in every row."""
        chosen = logits.index_select(1, self._columns.to(logits.device)).float()
        if self._offsets is not None:
            chosen = chosen + self._offsets.to(logits.device)
        return F.cross_entropy(chosen, targets if targets.is_floating_point() else self.soft(targets))


class Multi:
    """Binary cross-entropy of every declared row; an absent label is negative only where it is declared exhaustive.

    Args:
        smoothing: how far a known 1 or 0 is moved towards one half, from 0 to 1.
    """

    def __init__(
        self,
        rows: Sequence[int],
        exhaustive_rows: Sequence[int] = (),
        *,
        smoothing: float = 0.0,
    ) -> None:
        self._columns = torch.tensor(rows, dtype=torch.long)
        self._exhaustive = torch.isin(self._columns, torch.tensor(exhaustive_rows, dtype=torch.long))
        self._smoothing = smoothing

    def soft(self, labels: Tensor) -> Tensor:
        """Targets float32 (b, 2, rows) of bool labels (b, n_labels): weight as positive, weight as negative."""
        present = labels.index_select(1, self._columns.to(labels.device))
        absent = ~present & self._exhaustive.to(labels.device)
        weights = torch.stack([present, absent], dim=1).to(torch.float32)
        return weights.lerp(weights.flip(1), self._smoothing / 2) if self._smoothing else weights

    def count(self, targets: Tensor) -> Tensor:
        """Number of known (image, label) pairs: what the mean is taken over."""
        return (targets if targets.is_floating_point() else self.soft(targets)).sum()

    def right(self, targets: Tensor) -> Tensor:
        """As for `Single`."""
        return _largest((targets if targets.is_floating_point() else self.soft(targets))[:, 0])

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the known (image, label) pairs of the batch; arguments as for `Single`. No known pair gives 0."""
        weights = targets if targets.is_floating_point() else self.soft(targets)
        chosen = logits.index_select(1, self._columns.to(logits.device)).float()
        each = weights[:, 0] * F.softplus(-chosen) + weights[:, 1] * F.softplus(chosen)
        return each.sum() / weights.sum().clamp(min=TINY)


def log_prior(
    label_offsets: npt.NDArray[np.int64], label_indices: npt.NDArray[np.int64], rows: Sequence[int]
) -> Tensor:
    """Log of the share (rows,) of each declared row among a site's images; a row without any counts as one image.

    Args:
        label_offsets, label_indices: see `rin.common.batches.Labelled`; an image counts evenly for each of its labels.
    """
    labels = np.diff(label_offsets)
    counts = np.bincount(label_indices, np.repeat(1 / np.maximum(labels, 1), labels), minlength=max(rows) + 1)
    declared = np.maximum(counts[list(rows)], 1.0)
    return torch.from_numpy(np.log(declared / declared.sum())).float()


def _largest(shares: Tensor) -> Tensor:
    """Where the largest share of each row is, none where all are 0."""
    return (shares == shares.amax(1, keepdim=True)) & (shares > 0)


LOSSES: Final[dict[str, type[Single] | type[Multi]]] = {"single": Single, "multi": Multi}
