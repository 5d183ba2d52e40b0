"""A look at whether a network's statistics fit the normalisation that its file is said to need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the one base of all of them; torch has no public name for it

from rin.common.backbones import NORMALISATIONS, Network, scaled

Channels = tuple[float, float, float]
Layer = TypeVar("Layer", bound=nn.Module)

# Conventions that circulate for RadImageNet weights beside ours, as mean and deviation of grey values in 0..1.
CAFFE: Final[Channels] = (103.939 / 255, 116.779 / 255, 123.68 / 255)
UNIT: Final[Channels] = (1.0, 1.0, 1.0)
BYTES: Final[Channels] = (1 / 255, 1 / 255, 1 / 255)
FOREIGN: Final[dict[str, tuple[Channels, Channels]]] = {
    "values in 0..1": ((0.0, 0.0, 0.0), UNIT),
    "values in 0..255": ((0.0, 0.0, 0.0), BYTES),
    "caffe (values in 0..255 less the channels' means)": (CAFFE, BYTES),
    "caffe divided by 255": (CAFFE, UNIT),
}

# What may differ between the images here and those that the network was trained on. Tried on five image sets (phantoms,
# CT, US, brain MR, chest radiographs), six conventions and five backbones: the true one is never warned of, and a wrong
# one of ours is in 598 of 600 cases.
GREYS: Final = np.linspace(0.02, 0.75, 74)  # mean grey value of the training images
USUAL_GREYS: Final = (0.12, 0.55)
GREY_SLACK: Final = 0.1
CONTRAST_SLACK: Final = 0.45  # of the logarithm of the images' contrast
MEAN_SLACK: Final = 0.1  # in deviations of a channel
NATURAL: Final[Channels] = (0.485, 0.456, 0.406)  # mean colour of ImageNet's photographs
RARE: Final = 1.0  # what a convention that is not ours must fit better to be named
MARGIN: Final = 1.5  # another convention must be this much better
STRANGE: Final = 12.0  # nothing fits


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the guard found.

    Attributes:
        declared: the normalisation that the network is used with.
        best: the convention that fits best; empty where nothing can be checked.
        warning: in words, empty where the declared one fits or nothing can be checked.
    """

    declared: str
    best: str = ""
    warning: str = ""

    @property
    def words(self) -> str:
        """One sentence for people."""
        if not self.best:
            return "the normalisation cannot be checked: there are no running statistics of a trained batch norm"
        return self.warning or f"the first norm's running statistics fit {self.declared}"


def check(network: Network, images: npt.NDArray[np.uint8]) -> Verdict:
    """Compare the first batch norm's running statistics with what each convention would give.

    A first convolution is linear and the images are grey, so a channel's running mean is that of a constant image of
    some grey value, and its deviation is that of the images here but for their contrast. Under a wrong convention no
    plausible grey value and contrast explain the statistics.

    Args:
        images: uint8 (n, h, w), about as bright and rich in contrast as radiology is; a dozen are enough.
    """
    declared = network.model.normalisation
    norm, convolution = _first(network.backbone, _BatchNorm), _first(network.backbone, nn.Conv2d)
    if norm is None or convolution is None or norm.running_mean is None or norm.running_var is None:
        return Verdict(declared)
    mean = norm.running_mean.detach().double().cpu().numpy()
    deviation = np.sqrt(np.maximum(norm.running_var.detach().double().cpu().numpy(), 1e-20))
    if not norm.running_mean.any() and bool((norm.running_var == 1).all()):  # no image has been here yet
        return Verdict(declared)
    taps = convolution.weight.detach().double().cpu().sum((2, 3)).numpy()
    if taps.shape != (len(mean), 3):
        return Verdict(declared)
    grey = scaled(torch.from_numpy(images), network.image_size)
    costs: dict[str, float] = {}
    for name, (offset, scale) in {**NORMALISATIONS, **FOREIGN}.items():
        seen = _deviations(convolution, grey, scale)
        costs[name] = _cost(mean, deviation, taps, seen, np.asarray(offset), np.asarray(scale)) + RARE * (
            name in FOREIGN
        )
    best = min(costs, key=lambda name: costs[name])
    return Verdict(declared, best, _warning(declared, best, costs))


def _warning(declared: str, best: str, costs: dict[str, float]) -> str:
    if costs[best] > STRANGE:
        return "the first norm's running statistics fit no known normalisation; the weights may be damaged"
    if costs[declared] - costs[best] > MARGIN:
        return f"the first norm's running statistics do not fit the normalisation {declared}; best fits: {best}"
    return ""


def _first(network: nn.Module, kind: type[Layer]) -> Layer | None:
    return next((module for module in network.modules() if isinstance(module, kind)), None)


def _deviations(convolution: nn.Conv2d, grey: Tensor, scale: Channels) -> npt.NDArray[np.float64]:
    """Of every channel that the convolution puts out; offsets matter only at the border and are left out."""
    device = convolution.weight.device
    with torch.no_grad():
        out = convolution(grey.to(device) / torch.tensor(scale, device=device).view(1, 3, 1, 1))
    return out.double().std((0, 2, 3)).clamp_min(1e-10).cpu().numpy()


def _cost(
    mean: npt.NDArray[np.float64],
    deviation: npt.NDArray[np.float64],
    taps: npt.NDArray[np.float64],
    seen: npt.NDArray[np.float64],
    offset: npt.NDArray[np.float64],
    scale: npt.NDArray[np.float64],
) -> float:
    """How implausible the training images are under one convention: squared misfits in units of their slack."""
    strong = seen >= np.median(seen)  # filters for colour are silent on grey images and would tell nothing
    contrast = float(np.median(np.log(deviation[strong] / seen[strong])))
    found = []
    for colour, outside in [*((np.full(3, g), _outside(g)) for g in GREYS), (np.asarray(NATURAL), 0.0)]:
        misfit = float(np.median(np.abs(mean - taps @ ((colour - offset) / scale)) / deviation))
        found.append(outside + (misfit / MEAN_SLACK) ** 2)
    return (contrast / CONTRAST_SLACK) ** 2 + min(found)


def _outside(grey: float) -> float:
    low, high = USUAL_GREYS
    return (max(0.0, low - grey, grey - high) / GREY_SLACK) ** 2
