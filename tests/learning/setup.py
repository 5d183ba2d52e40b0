"""What the learning tests share: a small network in place of resnet18, and the plan of three sites of equal weight."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from rin.common.backbones import BackboneRow
from tests import simulator


class Shallow(nn.Sequential):
    """Convolutions of 3x3 with batch norm, each layer half the size of the one before; every place is a feature.

    It learns small pictures in seconds where a deep network needs a hundred times the images.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (before, after) in enumerate(pairwise((3, *widths)), 1):
            layers[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1, bias=False)
            layers[f"pool{i}"] = nn.MaxPool2d(2)  # before the norm, which is then a quarter of the work
            layers[f"bn{i}"] = nn.BatchNorm2d(after)
            layers[f"relu{i}"] = nn.ReLU()
        layers["flat"] = nn.Flatten()
        layers["fc"] = nn.Identity()
        super().__init__(layers)


def shallow(widths: Sequence[int], side: int) -> BackboneRow:
    """A row of the table of backbones for pictures of `side` pixels; it makes no levels for a U-Net."""
    features = widths[-1] * (side >> len(widths)) ** 2
    return BackboneRow(functools.partial(Shallow, widths), features, (1, 1, 1, 1, 1))


def plan_bytes(sites: Sequence[str], seed: int, *, side: int, rounds: int, steps: int, momentum: float) -> bytes:
    """Sites of equal weight. Federated training takes a third of the sequential steps of pooled training at equal

    images seen; the server's momentum makes up for some of it.
    """
    text = simulator.plan_text(
        sites,
        model={"image_size": side},
        training={
            "rounds": rounds,
            "local_steps": steps,
            "batch_size": 32,
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "weight_decay": 0.01,
            "warmup_steps": rounds * steps // 10,
            "seed": seed,
        },
        strategy={"name": "fedavgm", "server_momentum": momentum},
        limits={"min_sites": 2, "deadline_s": 7200.0},
        retention={"checkpoints": 1},
    )
    for i, site in enumerate(sites, 1):
        text = text.replace(f"{site} = {float(i)}".encode(), f"{site} = 1.0".encode())
    return text
