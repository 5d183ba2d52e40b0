"""Segment: shapes of the U-Net, its loss at known answers, and that it learns."""

from __future__ import annotations

import pytest
import torch

from rin.common import fit
from rin.common.backbones import initial
from rin.common.plan import Model
from rin.server.bench.segment import UNet, mask_loss

MODEL = Model.model_validate({"backbone": "resnet18", "image-size": 32})


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("resnet18", 32),
        ("resnet18", 49),
        ("resnet50", 32),
        ("inception_v3", 75),
        ("inception_v3", 96),
        ("densenet121", 45),
        ("inception_resnet_v2", 75),
        ("swin_t", 32),
        ("swin_t", 50),
    ],
)
def test_one_logit_a_pixel_of_the_networks_own_size(backbone: str, size: int) -> None:
    unet = UNet(initial(Model.model_validate({"backbone": backbone, "image-size": size}), 0, 2)).eval()
    with torch.inference_mode():
        assert unet(torch.zeros(2, 256, 256, dtype=torch.uint8)).shape == (2, size, size)
    found = unet(torch.zeros(1, 1, size, size))
    assert found.shape == (1, size, size)
    mask_loss(found, torch.ones(1, size, size)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


def test_the_encoder_is_the_backbone_and_has_no_head() -> None:
    names = set(UNet(initial(MODEL, 0, 2)).state_dict())
    assert {f"network.backbone.{name}" for name in ("conv1.weight", "layer4.1.bn2.running_var")} <= names
    assert not [name for name in names if "head" in name]


def test_the_loss_is_zero_for_certain_truth_and_large_for_certain_falsehood() -> None:
    masks = torch.zeros(2, 8, 8)
    masks[:, :4] = 1
    right = (masks * 2 - 1) * 50
    assert mask_loss(right, masks).item() == pytest.approx(0.0, abs=1e-3)
    assert mask_loss(-right, masks).item() > 40
    assert mask_loss(torch.full((1, 8, 8), -50.0), torch.zeros(1, 8, 8)).item() == pytest.approx(0.0, abs=1e-3)


def test_it_learns_to_outline_a_square() -> None:
    fit.settle(torch.device("cpu"), 1)
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(8, 32, 32)
    for index in range(8):
        x, y = torch.randint(4, 18, (2,), generator=generator).tolist()
        masks[index, y : y + 10, x : x + 10] = 1
    images = (0.3 + 0.5 * masks[:, None] + 0.05 * torch.rand(8, 1, 32, 32, generator=generator)).clamp(0, 1)
    torch.manual_seed(0)  # of the decoder
    unet = UNet(initial(MODEL, 0, 1)).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    recipe = fit.Recipe(steps=40, learning_rate=2e-3, optimizer="adamw")
    fit.fit(unet, lambda first: [(images, masks)] * 40, mask_loss, recipe, device=torch.device("cpu"), key=(0,))
    with torch.inference_mode():
        found = unet(images) > 0
    both = (found & (masks > 0)).sum()
    assert 2 * both / (found.sum() + masks.sum()) > 0.8
