"""The two losses of the plan's target, taken over the labels that a site declares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def single(rows: Sequence[int], exhaustive_rows: Sequence[int] = ()) -> Loss:
    """Softmax cross-entropy over the declared head rows; the other rows get no gradient.

    The target is spread evenly over the declared labels of the image. `exhaustive_rows` has no meaning here: softmax
    says that exactly one label holds.
    """
    columns = torch.tensor(rows, dtype=torch.long)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the batch; logits (b, n_labels), labels bool (b, n_labels) with a declared one in every row."""
        index = columns.to(logits.device)
        target = labels.index_select(1, index).to(torch.float32)
        target = target / target.sum(1, keepdim=True).clamp(min=1)
        return F.cross_entropy(logits.index_select(1, index).float(), target)

    return loss


def multi(rows: Sequence[int], exhaustive_rows: Sequence[int] = ()) -> Loss:
    """Binary cross-entropy of every declared row; an absent label is negative only where it is declared exhaustive."""
    columns = torch.tensor(rows, dtype=torch.long)
    exhaustive = torch.isin(columns, torch.tensor(exhaustive_rows, dtype=torch.long))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the known (image, label) pairs of the batch; shapes as for `single`. No known pair gives 0."""
        index = columns.to(logits.device)
        target = labels.index_select(1, index)
        known = target | exhaustive.to(logits.device)
        chosen = logits.index_select(1, index).float()
        each = F.binary_cross_entropy_with_logits(chosen, target.to(torch.float32), reduction="none")
        return (each * known).sum() / known.sum().clamp(min=1)

    return loss


LOSSES: Final[dict[str, Callable[[Sequence[int], Sequence[int]], Loss]]] = {"single": single, "multi": multi}
