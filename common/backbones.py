"""The networks of the plan: grey uint8 images in, features and head logits out; one table of backbones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18, resnet50

from rin.common.labels import label_set
from rin.common.plan import Model


@dataclass(frozen=True, slots=True)
class BackboneRow:
    """One architecture.

    Attributes:
        builder: makes the torchvision network with random weights.
        width: number of features of an image.
        channels: channels of the five feature maps, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the input's side.
    """

    builder: Callable[[], ResNet]
    width: int
    channels: tuple[int, int, int, int, int]


BACKBONES: Final[dict[str, BackboneRow]] = {
    "resnet18": BackboneRow(lambda: resnet18(weights=None), 512, (64, 64, 128, 256, 512)),
    "resnet50": BackboneRow(lambda: resnet50(weights=None), 2048, (64, 256, 512, 1024, 2048)),
}

# Mean and deviation of the three channels, for grey values in 0..1.
NORMALISATIONS: Final[dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]]] = {
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def scaled(images: Tensor, size: int) -> Tensor:
    """Grey images at the network's size, on the device where they lie.

    Args:
        images: uint8 (b, h, w).
        size: pixels a side.

    Returns:
        float32 (b, 1, size, size) in 0..1; smaller images come from the mean over the area, larger ones are linear.
    """
    grey = images.unsqueeze(1).to(torch.float32).mul_(1 / 255)
    height, width = grey.shape[2:]
    if (height, width) == (size, size):
        return grey
    if height % size == 0 and width % size == 0:  # the mean over whole cells: what antialiasing comes to, and faster
        return F.avg_pool2d(grey, (height // size, width // size))
    return F.interpolate(grey, (size, size), mode="bilinear", antialias=True, align_corners=False)


class Network(nn.Module):
    """Backbone and head as every site trains them.

    Parameter names are `backbone.<torchvision's name>` and `head.weight`, `head.bias`: without their first part the
    backbone's load into torchvision's network as they are.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: Model, n_labels: int) -> None:
        super().__init__()
        row = BACKBONES[model.backbone]
        self.backbone = row.builder()
        self.backbone.fc = nn.Identity()  # type: ignore[assignment]  # torchvision declares a Linear
        self.head = nn.Linear(row.width, n_labels)
        self.image_size, self.width, self.channels = model.image_size, row.width, row.channels
        mean, deviation = NORMALISATIONS[model.normalisation]
        # A function of the plan, so not part of the weights.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1), persistent=False)

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 (b, h, w), or grey float (b, 1, s, s) in 0..1, as the backbone's input (b, 3, s, s)."""
        grey = scaled(images, self.image_size) if images.dtype == torch.uint8 else images
        return ((grey - self.mean) / self.deviation).contiguous(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """(b, width) features of uint8 (b, h, w) images, or of grey float (b, 1, s, s) in 0..1."""
        return self.backbone(self.normalised(images))

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """The five maps (b, channels[i], s / 2^(i+1), s / 2^(i+1)), finest first; images as for `features`."""
        net = self.backbone
        maps = [net.relu(net.bn1(net.conv1(self.normalised(images))))]
        x = net.maxpool(maps[0])
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, n_labels), one column a head row; images as for `features`."""
        return self.head(self.features(images))


def build(model: Model, n_labels: int | None = None) -> Network:
    """The plan's network with fresh random weights, on the CPU; `n_labels` defaults to the whole label set."""
    return Network(model, len(label_set()) if n_labels is None else n_labels)


def initial(model: Model, seed: int, n_labels: int | None = None) -> Network:
    """`build` with weights that depend on `seed` only; the process's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(model, n_labels)
