"""Guard: a network that saw phantoms under one normalisation is warned of under every other, and not under its own."""

from __future__ import annotations

import contextlib

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from rin.common.backbones import NORMALISATIONS, Network, initial, scaled
from rin.common.guard import FOREIGN, check
from rin.common.plan import IMAGE_SIZES, Model
from rin.server.weightfiles import phantom_images

CONVENTIONS = {**NORMALISATIONS, **FOREIGN}


def network(backbone: str, normalisation: str, norm: str = "batch") -> Network:
    size = max(64, IMAGE_SIZES[backbone].smallest)
    return initial(
        Model.model_validate({"backbone": backbone, "norm": norm, "image-size": size, "normalisation": normalisation}),
        5,
    )


class Enough(Exception):
    """The first norm has seen the images; the rest of a large network would only take time."""


def stop(*_: object) -> None:
    raise Enough


def see(made: Network, convention: str, images: npt.NDArray[np.uint8]) -> None:
    """Fill the running statistics from `images` under `convention`, in training mode."""
    norms = [module for module in made.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[0].reset_running_stats()
    norms[0].momentum = None  # the plain mean over what it sees
    enough = norms[0].register_forward_hook(stop)
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in CONVENTIONS[convention])
    with torch.no_grad(), contextlib.suppress(Enough):
        made.train().backbone((scaled(torch.from_numpy(images), made.image_size) - mean) / deviation)
    enough.remove()
    made.eval()


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "inception_v3", "densenet121", "inception_resnet_v2"])
def test_the_wrong_normalisation_is_warned_of_and_the_right_one_named(backbone: str) -> None:
    for declared in NORMALISATIONS:
        made = network(backbone, declared)
        for convention in CONVENTIONS:
            see(made, convention, phantom_images(16, seed=1))
            found = check(made, phantom_images())
            assert found.best == convention
            assert bool(found.warning) == (declared != convention), found
            assert declared in found.words
            assert convention in found.words


def test_other_images_than_the_networks_own_do_not_alarm() -> None:
    """Darker ones, or of less contrast: still the same normalisation."""
    images = phantom_images(16, seed=1) * 0.7
    for declared in NORMALISATIONS:
        made = network("resnet18", declared)
        for other in (images.astype(np.uint8), (images + 40).astype(np.uint8)):
            see(made, declared, other)
            assert not check(made, phantom_images()).warning


def test_statistics_of_nothing_are_said_to_fit_nothing() -> None:
    made = network("resnet18", "symmetric")
    see(made, "symmetric", phantom_images(8))
    norm = made.get_submodule("backbone.bn1")
    norm.running_mean.mul_(0).add_(1e4)  # type: ignore[union-attr]
    assert "fit no known normalisation" in check(made, phantom_images()).warning


@pytest.mark.parametrize(("backbone", "norm"), [("swin_t", "batch"), ("resnet18", "group"), ("resnet18", "batch")])
def test_a_network_without_running_statistics_or_training_cannot_be_checked(backbone: str, norm: str) -> None:
    found = check(network(backbone, "symmetric", norm), phantom_images(2))
    assert (found.warning, found.best) == ("", "")
    assert "cannot be checked" in found.words
