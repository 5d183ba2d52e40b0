"""Freeze: which weights train at each level, and that the rest of a network comes out of a round as it went in."""

from __future__ import annotations

import copy
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rin.common.backbones import BACKBONES, Network, build, initial
from rin.common.fit import fit_round
from rin.common.freeze import TOP10, Level, frozen
from rin.common.labels import label_set_digest
from rin.common.norms import batch_norms
from rin.common.plan import IMAGE_SIZES, Model, Plan, Training
from rin.server.bench.segment import UNet

# Trainable backbone parameters at `top10`, and at `none`. The paper's Keras networks have 168,128 (densenet121), 192
# (inception_v3), 4,130,592 (inception_resnet_v2) and 3,416,576 (resnet50, of which 2,560 are convolution biases).
COUNTS = {
    "resnet18": (4_720_640, 11_176_512),
    "resnet50": (3_416_576 - 2_560, 23_508_032),
    "inception_v3": (192, 21_785_568),
    "densenet121": (168_128, 6_953_856),
    "inception_resnet_v2": (4_130_592, 54_306_464),
    "swin_t": (7_093_464, 27_519_354),
}


def model(backbone: str, norm: str = "batch") -> Model:
    return Model.model_validate({"backbone": backbone, "norm": norm, "image-size": IMAGE_SIZES[backbone].smallest})


def trainable(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_the_paper_s_counts(name: str) -> None:
    net = build(model(name), 2)
    assert set(TOP10) == set(BACKBONES)
    levels: list[tuple[Level, int]] = [("top10", COUNTS[name][0]), ("head", 0), ("none", COUNTS[name][1])]
    for level, count in levels:
        frozen(net, level)
        assert trainable(net.backbone) == count
        assert trainable(net.head) == 2 * net.width + 2
    assert net.still == ()


@pytest.mark.parametrize("level", get_args(Level))
@pytest.mark.parametrize("name", ["resnet18", "inception_v3"])
def test_exactly_the_frozen_batch_norms_stay_in_evaluation(name: str, level: Level) -> None:
    net = frozen(build(model(name), 2).train(), level)
    for _ in range(2):
        norms = batch_norms(net.backbone)
        training = {norm for norm, layer in norms.items() if layer.training}
        assert training == {n for n, layer in norms.items() if any(p.requires_grad for p in layer.parameters())}
        assert not net.still or training != set(norms)
        assert net.training and net.backbone.training
        UNet(net).train()  # whatever holds the network
    assert not [layer for layer in net.eval().modules() if layer.training]
    assert all(layer.training for layer in frozen(net, "none").train().modules())


def test_a_copy_keeps_its_own_norms_still() -> None:
    net = frozen(build(model("resnet18"), 2), "top10")
    twin = copy.deepcopy(net).train()
    assert len(twin.still) == len(net.still) == 18 and not set(twin.still) & set(net.still)
    assert [layer.training for layer in batch_norms(twin.backbone).values()] == 18 * [False] + 2 * [True]


def plan(backbone: str, norm: str, freeze: str) -> Plan:
    return Plan.model_validate(
        {
            "protocol": 1,
            "name": "test",
            "label-set": label_set_digest(),
            "sites": {"siteA": 1.0, "siteB": 1.0, "siteC": 1.0},
            "model": model(backbone, norm).model_dump(by_alias=True),
            "training": {"rounds": 1, "local-steps": 2, "batch-size": 4, "learning-rate": 0.05, "freeze": freeze},
        }
    )


class Noise:
    """Random images, every second one of the other label; a Data of 165 labels."""

    def __len__(self) -> int:
        return 8

    def batch(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32), dtype=np.uint8)
        return pixels[index], np.eye(165, dtype=bool)[np.arange(8) % 2][index]


def trained(p: Plan) -> tuple[Network, dict[str, Tensor], dict[str, Tensor]]:
    """The network after a round, and its state before and after."""
    net = initial(p.model, 0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fit_round(net, Noise(), p, rows=(0, 1), round=1, site="siteA", device=torch.device("cpu"), threads=1)
    return net, before, net.state_dict()


@pytest.mark.parametrize(
    ("name", "norm", "freeze"),
    [
        ("resnet18", "batch", "none"),
        ("resnet18", "batch", "head"),
        ("resnet18", "group", "top10"),
        ("densenet121", "batch", "top10"),
        ("inception_v3", "batch", "top10"),
        ("swin_t", "batch", "head"),
    ],
)
def test_a_round_leaves_what_is_frozen_bit_for_bit(name: str, norm: str, freeze: Any) -> None:
    net, before, after = trained(plan(name, norm, freeze))
    live = {n for n, p in net.named_parameters() if p.requires_grad}
    # A norm trains as a whole: its statistics move where one of its parameters does.
    owners = {n.rpartition(".")[0] for n in live}
    live |= {
        n for n in before if n.rpartition(".")[2].startswith(("running", "num_b")) and n.rpartition(".")[0] in owners
    }
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved <= live
    assert "head.weight" in moved and {n for n in live if n.endswith("running_var")} <= moved
    assert (moved == {"head.weight", "head.bias"}) == (freeze == "head")
    if name == "inception_v3":
        assert {n for n in moved if n.startswith("backbone")} == {
            f"backbone.Mixed_7c.branch_pool.bn.{x}"
            for x in ("bias", "running_mean", "running_var", "num_batches_tracked")
        }


def test_the_default_trains_all() -> None:
    assert Training.model_validate({"rounds": 1, "local-steps": 1, "batch-size": 1}).freeze == "none"
