import torch
from torch import nn

from rin.common.ema import Average


def test_the_mean_is_weighted_by_age_and_forgets_the_start() -> None:
    module = nn.BatchNorm1d(3)
    average = Average(module, 0.5)
    for step, value in enumerate((1.0, 2.0, 4.0), 1):
        for name, tensor in module.state_dict().items():
            tensor.fill_(value if name != "num_batches_tracked" else step)
        average.after(step)
    average.settle()
    expected = (1.0 * 0.25 + 2.0 * 0.5 + 4.0) / 1.75
    for name, tensor in module.state_dict().items():
        wanted = torch.full_like(tensor, expected if name != "num_batches_tracked" else 3)
        torch.testing.assert_close(tensor, wanted)


def test_the_first_step_is_its_own_mean() -> None:
    module = nn.Linear(2, 2)
    average = Average(module, 0.999)
    with torch.no_grad():
        module.weight.mul_(7.0)
    before = module.weight.detach().clone()
    average.after(1)
    average.settle()
    assert torch.equal(module.weight, before)
