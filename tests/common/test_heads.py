import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rin.common.heads import LOSSES, Multi, Single, log_prior


def test_single_is_the_softmax_over_declared_rows_only() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 9.0], [0.0, 1.0, 3.0, -9.0]], requires_grad=True)
    labels = torch.tensor([[True, False, False, False], [False, False, True, False]])
    loss = Single((0, 2))(logits, labels)
    expected = F.cross_entropy(logits[:, [0, 2]], torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[:, [1, 3]].abs().max() == 0
    assert logits.grad[:, [0, 2]].abs().min() > 0


def test_single_spreads_the_target_over_declared_labels_of_the_image() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0, 5.0]])
    labels = torch.tensor([[True, True, False, True]])  # row 3 is not declared
    log_p = logits[:, :3].log_softmax(1)[0]
    assert Single((0, 1, 2))(logits, labels).item() == pytest.approx(-(log_p[0] + log_p[1]).item() / 2)


def test_multi_takes_absence_as_negative_only_where_exhaustive() -> None:
    logits = torch.zeros(1, 4, requires_grad=True)
    labels = torch.tensor([[True, False, False, False]])
    loss = Multi((0, 1, 2), (1,))(logits, labels)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([-0.25, 0.25, 0.0, 0.0])


def test_multi_without_a_known_pair_is_zero_and_finite() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = Multi((0, 1), ())(logits, torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("target", sorted(LOSSES))
def test_losses_are_taken_in_float32_under_bf16(target: str) -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    labels = F.one_hot(torch.tensor([0, 1, 2, 0]), 5).bool()
    loss = LOSSES[target]((0, 1, 2), (0, 1))(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_smoothing_spreads_over_the_declared_rows_only() -> None:
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    labels = F.one_hot(torch.tensor([0, 3]), 5).bool()
    expected = F.cross_entropy(logits[:, [0, 2, 3]], torch.tensor([0, 2]), label_smoothing=0.3)
    assert Single((0, 2, 3), smoothing=0.3)(logits, labels).item() == pytest.approx(expected.item())
    weights = Multi((0, 2, 3), (2,), smoothing=0.2).soft(labels)
    assert weights[0, 0].tolist() == pytest.approx([0.9, 0.1, 0.0])  # what is not known stays unknown
    assert weights[0, 1].tolist() == pytest.approx([0.1, 0.9, 0.0])


def test_adjusted_logits_make_a_rare_label_dearer() -> None:
    offsets, indices = np.array([0, 1, 2, 4, 5]), np.array([0, 0, 0, 2, 0])
    prior = log_prior(offsets, indices, (0, 2, 3))
    assert prior.exp().tolist() == pytest.approx([3.5 / 5.5, 1 / 5.5, 1 / 5.5])
    logits = torch.zeros(1, 4)
    common, rare = (F.one_hot(torch.tensor([row]), 4).bool() for row in (0, 2))
    goal = Single((0, 2, 3), offsets=2.0 * prior)
    expected = F.cross_entropy(logits[:, [0, 2, 3]] + 2.0 * prior, torch.tensor([1]))
    assert goal(logits, rare).item() == pytest.approx(expected.item())
    assert goal(logits, rare) > goal(logits, common)


@pytest.mark.parametrize("target", sorted(LOSSES))
def test_right_is_the_label_with_the_largest_share(target: str) -> None:
    goal = LOSSES[target]((0, 2, 3), (2,))
    labels = torch.tensor([[True, False, False, True], [False, True, True, False], [False, True, False, False]])
    assert goal.right(labels).tolist() == [[True, False, True], [False, True, False], [False, False, False]]
    mixture = goal.soft(labels[:2]) * 0.8 + goal.soft(labels[:2].flip(0)) * 0.2
    assert goal.right(mixture).tolist() == [[True, False, True], [False, True, False]]
