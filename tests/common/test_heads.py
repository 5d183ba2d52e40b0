import math

import pytest
import torch
import torch.nn.functional as F

from rin.common.heads import LOSSES, Multi, Single


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
