"""What a site may send of an evaluation: by the plan's target, in parts that its batch size allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rin.common.backbones import initial
from rin.common.errors import RefusedError
from rin.common.evaluate import Evaluation, evaluate, scores_of
from rin.common.labels import label_set
from rin.common.metrics import auc
from rin.common.plan import Plan
from rin.common.scores import groups
from tests.common.test_fit import CPU, ROWS, Stripes, plan

A, B = (label.index for label in groups()["US", "usthyroid"])
ALL = frozenset({"validation", "auc"})


def found(n: int = 60) -> tuple[Evaluation, np.ndarray, np.ndarray]:
    """Two labels in turn; the outputs tell them apart, but each image's are shifted by an offset of its own."""
    rng = np.random.default_rng(0)
    labels = np.zeros((n, len(label_set())), bool)
    labels[np.arange(n), np.where(np.arange(n) % 2, B, A)] = True
    logits = np.zeros((n, len(label_set())), np.float32)
    logits[:, [A, B]] = labels[:, [A, B]] * 2.0 + rng.normal(0, 2, (n, 2)) + rng.normal(0, 9, (n, 1))
    return Evaluation(logits, labels, {}), logits, labels


@pytest.mark.parametrize("target", ["single", "multi"])
def test_the_auc_is_of_what_the_target_means(target: str) -> None:
    evaluation, logits, labels = found()
    with_target = Plan.model_validate(
        {**plan().model_dump(by_alias=True), "model": {"backbone": "resnet18", "target": target}}
    )
    (group,) = scores_of(evaluation, with_target, rows=(A, B), patient=np.arange(60), allowed=ALL)
    output = logits[:, A] - logits[:, B] if target == "single" else logits[:, A]
    assert dict(group.auc)[A] == pytest.approx(auc(output, labels[:, A]), abs=1e-4)
    assert group.images == 60 and group.top1 == int((logits[:, A] > logits[:, B])[labels[:, A]].sum()) + int(
        (logits[:, B] > logits[:, A])[labels[:, B]].sum()
    )


def test_outputs_that_are_no_numbers_are_refused() -> None:
    evaluation, logits, _ = found()
    logits[3, A] = np.nan
    with pytest.raises(RefusedError) as caught:
        scores_of(evaluation, plan(), rows=(A, B), patient=np.arange(60), allowed=ALL)
    assert caught.value.code == "not-finite"


def test_the_split_is_gone_through_once_and_in_order() -> None:
    data = Stripes(37)
    network = initial(plan().model, 0).train()
    result = evaluate(network, data, plan(), rows=ROWS, device=CPU, threads=1)
    assert result.logits.shape == result.labels.shape == (37, len(label_set()))
    assert np.array_equal(result.labels, data.labels)
    assert network.training
    again = evaluate(network, data, plan(batch_size=5), rows=ROWS, device=CPU, threads=1)
    assert torch.allclose(torch.from_numpy(again.logits), torch.from_numpy(result.logits), atol=1e-4)
