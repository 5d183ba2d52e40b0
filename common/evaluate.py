"""Looks at a network's outputs over a split of images, which it leaves as it was; nothing is trained here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rin.common.backbones import Network
from rin.common.batches import Data
from rin.common.disclosure import published
from rin.common.errors import RefusedError
from rin.common.fit import EVAL_BATCH, faults, infer, never, settle
from rin.common.heads import LOSSES
from rin.common.metrics import log_softmax, macro_auc, outcomes, top_counts
from rin.common.plan import MetricName, Plan
from rin.common.scores import GroupScores


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Logits float32 and labels bool, both (n, n_labels); mean `loss`, counts `top1`, `top5`, `images`."""

    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.bool_]
    metrics: dict[MetricName, float]


def evaluate(
    module: Network,
    data: Data,
    plan: Plan,
    *,
    rows: Sequence[int],
    exhaustive_rows: Sequence[int] = (),
    device: torch.device,
    threads: int,
    cancelled: Callable[[], bool] = never,
) -> Evaluation:
    """Run `module` over all of `data`, without augmentation; counts and loss are over the declared `rows`.

    The module comes back in the modes that it had.

    Raises:
        RefusedError: no-data, cancelled (asked before each batch), memory or device.
    """
    if len(data) == 0:
        raise RefusedError("no-data")
    settle(device, threads)
    logits, labels = [], []
    with _eval_mode(module), faults():
        module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for start in range(0, len(data), EVAL_BATCH):
            images, found = data.batch(np.arange(start, min(start + EVAL_BATCH, len(data))))
            # Never more at once than in training: whoever cancels waits for a step at most.
            size = min(EVAL_BATCH, plan.training.batch_size)
            logits.append(infer(module, images, device=device, batch_size=size, cancelled=cancelled))
            labels.append(found)
    every, known = np.concatenate(logits), np.concatenate(labels)
    loss = LOSSES[plan.model.target](rows, exhaustive_rows)(torch.from_numpy(every), torch.from_numpy(known))
    counts = top_counts(every, known, rows)
    metrics: dict[MetricName, float] = {"loss": loss.item()}
    metrics.update({"top1": counts["top1"], "top5": counts["top5"], "images": counts["images"]})
    return Evaluation(every, known, metrics)


def scores_of(
    found: Evaluation, plan: Plan, *, rows: Sequence[int], patient: npt.NDArray[np.int64], allowed: Set[Any]
) -> tuple[GroupScores, ...]:
    """What a site may send of `found`: counts, and the AUC of each row within its modality and anatomy.

    With `target = "single"` the AUC is of the softmax over the declared rows, else of the row's own output.

    Args:
        rows: declared head rows.
        patient: (n,), the patient of each image.
        allowed: the names of figures that plan and site both allow.

    Raises:
        RefusedError: not-finite.
    """
    if not np.isfinite(found.logits).all():
        raise RefusedError("not-finite")
    single = plan.model.target == "single"
    outputs = log_softmax(found.logits, rows) if single else found.logits.astype(np.float64)
    seen = outcomes(found.logits, found.labels, rows, patient)
    areas = macro_auc(outputs, seen.labels).by_row if "auc" in allowed else {}
    return published(seen, areas, allowed)


@contextlib.contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each part in the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
