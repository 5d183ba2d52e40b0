"""Patients side by side: each has the gradient that it has alone, to the bit; what cannot tell them apart is found."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rin.common import fit
from rin.common.backbones import BACKBONES, initial
from rin.common.bags import Bag, UnfitError, gradients, separable
from rin.common.plan import IMAGE_SIZES, Model

CPU = torch.device("cpu")


def network(backbone: str, norm: str = "group") -> nn.Module:
    side = IMAGE_SIZES[backbone].smallest  # type: ignore[index]
    module = initial(Model.model_validate({"backbone": backbone, "norm": norm, "image-size": side}), 1)
    return module.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def images(backbone: str, n: int) -> Tensor:
    side = IMAGE_SIZES[backbone].smallest  # type: ignore[index]
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(0))


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.float() - targets).square().mean()


def bags(inputs: Tensor, sizes: list[int]) -> list[Bag]:
    return [(part, torch.full((), float(number))) for number, part in enumerate(inputs.split(sizes))]


@pytest.mark.parametrize("backbone", sorted(set(BACKBONES) - {"swin_t"}))
def test_patients_may_stand_side_by_side_in_networks_of_convolutions(backbone: str) -> None:
    """In float32 some kernels round by the place of a row, and such networks are taken patient by patient."""
    if not fit.half_precision(CPU):
        pytest.skip("this processor has no bf16")
    fit.settle(CPU, 1)
    module = network(backbone)
    assert separable(module, list(module.parameters()), images(backbone, 4), half=True)


@pytest.mark.parametrize("half", [False, True])
def test_a_patient_has_the_same_bits_whoever_stands_beside(half: bool) -> None:
    fit.settle(CPU, 1)
    module, x = network("resnet18"), images("resnet18", 40)
    parameters, sizes = list(module.parameters()), [1, 2, 1, 1, 1, 2] * 5
    patients = bags(x, sizes)

    def each(order: list[int], most: int) -> dict[int, list[Tensor]]:
        found: dict[int, list[Tensor]] = {}
        while order:
            few = order[:1]
            while len(few) < most and sum(sizes[i] for i in order[: len(few) + 1]) <= 4 and len(few) < len(order):
                few = order[: len(few) + 1]
            found |= dict(
                zip(
                    few, gradients(module, loss, parameters, [patients[i] for i in few], rows=4, half=half), strict=True
                )
            )
            order = order[len(few) :]
        return found

    alone = each(list(range(30)), 1)
    for order in (list(range(30)), list(range(30))[::-1], [7 * i % 30 for i in range(30)]):
        among = each(order, 4)
        assert all(torch.equal(a, b) for i in range(30) for a, b in zip(alone[i], among[i], strict=True))
    assert {a.dtype for a in alone[0]} == ({torch.float32, torch.bfloat16} if half else {torch.float32})


def test_a_patient_that_is_no_number_leaves_the_others_alone() -> None:
    module, x = network("resnet18"), images("resnet18", 3)
    parameters = list(module.parameters())
    whole = gradients(module, loss, parameters, bags(x, [1, 1, 1]), rows=4, half=False)
    broken = x.clone()
    broken[1] = math.inf
    found = gradients(module, loss, parameters, bags(broken, [1, 1, 1]), rows=4, half=False)
    assert all(torch.equal(a, b) for i in (0, 2) for a, b in zip(whole[i], found[i], strict=True))
    assert not all(value.isfinite().all() for value in found[1])


def test_only_asked_parameters_are_told_apart_and_unused_ones_are_nought() -> None:
    module = nn.ModuleDict({"first": nn.Conv2d(1, 3, 3, bias=False), "last": nn.Linear(3, 2), "idle": nn.Linear(2, 2)})
    asked = [*module["last"].parameters(), *module["idle"].parameters()]

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return module["last"](module["first"](x).mean((2, 3)))

    found = gradients(Whole(), loss, asked, bags(torch.rand(3, 1, 5, 5), [1, 2]), rows=5, half=False)
    assert [len(one) for one in found] == [4, 4]
    assert all(torch.equal(value, torch.zeros_like(value)) for one in found for value in one[2:])
    assert not torch.equal(found[0][0], found[1][0])


class Shifted(nn.Module):
    """A parameter that no known layer uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(4, 2), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.shift


class Turned(nn.Module):
    """A layer whose rows are the patients' in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flip(0)).flip(0)


@pytest.mark.parametrize("module", [Shifted(), nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), Turned()])
def test_what_cannot_tell_patients_apart_is_found(module: nn.Module) -> None:
    x = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    assert not separable(module, list(module.parameters()), x, half=False)
    assert module.training


def test_a_parameter_used_in_two_ways_is_refused() -> None:
    module = Shifted()
    with pytest.raises(UnfitError):
        gradients(module, loss, list(module.parameters()), bags(torch.rand(2, 4), [1, 1]), rows=2, half=False)


def test_swin_is_taken_patient_by_patient() -> None:
    module = network("swin_t")
    assert not separable(module, list(module.parameters()), images("swin_t", 2), half=False)


@pytest.mark.parametrize(
    ("stride", "dilation", "kernel", "padding"),
    [(1, 1, 3, 1), (2, 1, 3, 1), (2, 1, 1, 0), (1, 2, 3, 2), (3, 1, 5, 0), (1, 1, 2, 0)],
)
@pytest.mark.parametrize("channels", [2, 64])
def test_convolutions_of_every_kind(stride: int, dilation: int, kernel: int, padding: int, channels: int) -> None:
    module = nn.Conv2d(channels, 6, kernel, stride, padding, dilation, bias=channels == 2).double()
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(5, channels, 8, 7, generator=torch.Generator().manual_seed(0)).double()
    sizes = [1, 3, 1]
    found = gradients(
        module, lambda y, t: (y - t).square().mean(), list(module.parameters()), bags(x, sizes), rows=6, half=False
    )
    for one, (part, target) in zip(found, bags(x, sizes), strict=True):
        wanted = torch.autograd.grad((module(part) - target).square().mean(), list(module.parameters()))
        for a, b in zip(one, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
