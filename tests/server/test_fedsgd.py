"""Federated SGD is SGD: one full-batch step a round through the real files and sums equals one step on all images."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rin.common import fit
from rin.common.backbones import BACKBONES, BackboneRow, Network, initial
from rin.common.heads import LOSSES
from rin.common.plan import Model, Strategy
from rin.common.weights import layout_of, read_into, save, write_update
from rin.server.aggregate import Contribution, mean_update
from rin.server.strategies import advance
from tests.simulator import stripes

CPU = torch.device("cpu")
ROWS = (0, 1, 2, 3)
ROUNDS = 20
IMAGES = {"siteA": 16, "siteB": 8, "siteC": 24}  # and as many are their weights
RECIPE = fit.Recipe(steps=1, learning_rate=0.02, momentum=0.0, weight_decay=0.0, schedule="constant")


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32, as on a CPU without bf16: in bf16 the two orders of summing differ by more than what is asked here."""
    monkeypatch.setattr(fit, "half_precision", lambda device: False)
    fit.settle(CPU, 1)


class Shallow(nn.Sequential):
    """Three smooth layers: at a kink of ReLU or max pooling the rounding of float32 becomes a jump."""

    def __init__(self) -> None:
        widths = (3, 16, 32, 32)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.SiLU()]
            layers += [nn.AvgPool2d(2)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Identity()


def step(network: Network, images: Tensor, labels: Tensor, number: int) -> None:
    loss = LOSSES["single"](ROWS, ())
    fit.fit(network.train(), lambda first: [(images, labels)], loss, RECIPE, device=CPU, key=("fedsgd", number))


def pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    found = stripes(ROWS, n, seed)
    labels = torch.zeros(n, 165, dtype=torch.bool)
    labels[range(n), [each[0] for each in found.labels]] = True
    return torch.from_numpy(found.pixels), labels


def test_twenty_rounds_of_fedsgd_equal_centralised_sgd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "resnet18", BackboneRow(Shallow, 32, (16, 32, 32, 32, 32)))
    model = Model.model_validate({"backbone": "resnet18", "norm": "group", "image-size": 32})
    central, network = initial(model, 0), initial(model, 0)
    start = {name: value.clone() for name, value in central.state_dict().items()}
    held = {site: pictures(n, seed) for seed, (site, n) in enumerate(IMAGES.items())}
    union = tuple(torch.cat([held[site][i] for site in held]) for i in range(2))
    layout, base = layout_of(network), tmp_path / "base"
    save(base, network, layout)
    for number in range(ROUNDS):
        received = []
        for site, (images, labels) in held.items():
            read_into(network, base, layout)
            step(network, images, labels, number)
            write_update(tmp_path / site, network, base, layout)
            received.append(Contribution(site, tmp_path / site, float(IMAGES[site]), ROWS))
        read_into(network, base, layout)
        flat = np.concatenate([network.state_dict()[t.name].numpy().reshape(-1) for t in layout.tensors])
        blocks = mean_update(received, layout, max_share=1.0, min_sites=1)
        state = tmp_path / "state"
        unseen = np.arange(len(ROWS), 165)  # rows of labels that no site declares
        advance(flat, blocks, layout, Strategy(), frozen=unseen, before=state if number else None, after=state)
        for tensor in layout.tensors:
            values = flat[tensor.offset // 4 : (tensor.offset + tensor.nbytes) // 4].reshape(tensor.shape)
            network.state_dict()[tensor.name].copy_(torch.from_numpy(values))
        save(base, network, layout)
        step(central, union[0], union[1], number)
    ends = central.state_dict()
    apart = max(float((value - ends[name]).abs().max()) for name, value in network.state_dict().items())
    moved = max(float((value - ends[name]).abs().max()) for name, value in start.items())
    print(f"{apart:.1e} apart after a way of {moved:.3f}")
    assert moved > 0.01
    assert apart <= 1e-5
