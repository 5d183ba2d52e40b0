"""The networks of the plan: grey uint8 images in, features and head logits out; one table of backbones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import densenet121, inception_v3, resnet18, resnet50, swin_t

from rin.common.labels import label_set
from rin.common.norms import grouped
from rin.common.plan import Model


@dataclass(frozen=True, slots=True)
class BackboneRow:
    """One architecture; its image sizes are in rin.common.plan.IMAGE_SIZES, its partial freezing in rin.common.freeze.

    Attributes:
        builder: makes the library's network with random weights and its classifier.
        width: number of features of an image, as the network gives them without its classifier.
        channels: channels of the feature maps, finest first. The maps have about 1/2, 1/4, 1/8, 1/16 and 1/32 of the
            input's side (fewer pixels where convolutions do not pad); where there are four they begin at 1/4.
        taps: the modules of the network that put the maps out. The mean of the last map over its area is the features.
        classifier: the library's name of the classifier, which is an identity here.
        channels_at: dimension of the channels in what the taps put out.
    """

    builder: Callable[[], nn.Module]
    width: int
    channels: tuple[int, ...]
    taps: tuple[str, ...] = ("relu", "layer1", "layer2", "layer3", "layer4")  # the ResNets'
    classifier: str = "fc"
    channels_at: int = 1


def _inception_v3() -> nn.Module:
    """torchvision's without its auxiliary classifier, drawn as published: by fan-in (Szegedy et al.'s own code).

    Of torchvision's two ways one is a deviation of 0.1 for every layer, the other torch's default for a linear layer.
    """
    network = inception_v3(weights=None, aux_logits=False, transform_input=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network


def _inception_resnet_v2() -> nn.Module:
    from timm.models.inception_resnet_v2 import InceptionResnetV2  # costs half a second, and imports all of timm

    return InceptionResnetV2()


BACKBONES: Final[dict[str, BackboneRow]] = {
    "resnet18": BackboneRow(lambda: resnet18(weights=None), 512, (64, 64, 128, 256, 512)),
    "resnet50": BackboneRow(lambda: resnet50(weights=None), 2048, (64, 256, 512, 1024, 2048)),
    "inception_v3": BackboneRow(
        _inception_v3,
        2048,
        (64, 192, 288, 768, 2048),
        ("Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"),
    ),
    "densenet121": BackboneRow(
        lambda: densenet121(weights=None),
        1024,
        (64, 256, 512, 1024, 1024),
        # The last is rectified in place by the network's own forward.
        tuple(f"features.{name}" for name in ("relu0", *(f"transition{i}.relu" for i in (1, 2, 3)), "norm5")),
        "classifier",
    ),
    "inception_resnet_v2": BackboneRow(
        _inception_resnet_v2,
        1536,
        (64, 192, 320, 1088, 1536),
        ("conv2d_2b", "conv2d_4a", "repeat", "repeat_1", "conv2d_7b"),
        "classif",
    ),
    "swin_t": BackboneRow(
        lambda: swin_t(weights=None),
        768,
        (96, 192, 384, 768),
        ("features.1", "features.3", "features.5", "norm"),
        "head",
        channels_at=3,
    ),
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

    Parameter names are `backbone.<the library's name>` and `head.weight`, `head.bias`: `backbone.state_dict()` loads
    into torchvision's or timm's network without its classifier as it is (with group norm: less the statistics).

    Attributes:
        still: modules that stay in evaluation mode whatever `train` says; see rin.common.freeze.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: Model, n_labels: int) -> None:
        super().__init__()
        row = BACKBONES[model.backbone]
        backbone = row.builder()
        setattr(backbone, row.classifier, nn.Identity())
        self.backbone = grouped(backbone) if model.norm == "group" else backbone
        self.head = nn.Linear(row.width, n_labels)
        self.model, self.image_size, self.width, self.channels = model, model.image_size, row.width, row.channels
        self.still: tuple[nn.Module, ...] = ()
        mean, deviation = NORMALISATIONS[model.normalisation]
        # A function of the plan, so not part of the weights.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Network:
        """Training or evaluation mode for all but what stays `still`."""
        super().train(mode)
        for module in self.still:
            module.eval()
        return self

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 (b, h, w), or grey float (b, 1, s, s) in 0..1, as the backbone's input (b, 3, s, s)."""
        grey = scaled(images, self.image_size) if images.dtype == torch.uint8 else images
        return ((grey - self.mean) / self.deviation).contiguous(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """(b, width) features of uint8 (b, h, w) images, or of grey float (b, 1, s, s) in 0..1."""
        return self.backbone(self.normalised(images))

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """The maps (b, channels[i], height, width), finest first; images as for `features`."""
        row, maps = BACKBONES[self.model.backbone], []
        hooks = [
            self.backbone.get_submodule(name).register_forward_hook(lambda module, given, out: maps.append(out))
            for name in row.taps
        ]
        try:
            self.backbone(self.normalised(images))
        finally:
            for hook in hooks:
                hook.remove()
        return [found.movedim(row.channels_at, 1) for found in maps]

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
