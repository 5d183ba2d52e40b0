"""A small U-Net whose encoder is a backbone (Ronneberger et al. 2015), with its loss."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rin.common.backbones import Network

WIDTHS: Final = (128, 64, 48, 32)  # channels of the decoder, coarsest first; a backbone of four maps uses three


class _Up(nn.Module):
    """Brings the coarse map to the size of the finer one, whatever the two are, joins them, convolves once."""

    def __init__(self, coarse: int, fine: int, out: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(coarse + fine, out, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        larger = F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        return F.relu(self.norm(self.convolution(torch.cat([larger, fine], dim=1))))


class UNet(nn.Module):
    """One logit a pixel: uint8 (b, h, w), or grey float (b, 1, s, s) in 0..1, to (b, s, s)."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.network.head = nn.Identity()  # type: ignore[assignment]  # a segmentation has no class head
        channels = network.channels[::-1]
        coarse, ups = channels[0], []
        for fine, out in zip(channels[1:], WIDTHS, strict=False):
            ups.append(_Up(coarse, fine, out))
            coarse = out
        self.ups = nn.ModuleList(ups)
        self.last = nn.Conv2d(coarse, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.network.feature_maps(images)[::-1]
        x = maps[0]
        for up, fine in zip(self.ups, maps[1:], strict=True):
            x = up(x, fine)
        side = self.network.image_size
        return F.interpolate(self.last(x).float(), size=(side, side), mode="bilinear", align_corners=False)[:, 0]


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy plus one minus soft Dice; both (b, s, s), masks in 0..1."""
    logits, masks = logits.float(), masks.float()
    predicted = logits.sigmoid()
    both, total = (predicted * masks).sum((1, 2)), (predicted + masks).sum((1, 2))
    soft = (2 * both + 1) / (total + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + 1 - soft.mean()
