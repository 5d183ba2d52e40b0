"""Norms: what replaces a batch norm keeps its eps, its weights, its name and what was fused into it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from rin.common.backbones import BACKBONES
from rin.common.norms import GroupNormThen, batch_norms, grouped, norm_layers

# Norms of each backbone, as its library defines it.
COUNTS = {
    "resnet18": 20,
    "resnet50": 53,
    "inception_v3": 94,
    "densenet121": 121,
    "inception_resnet_v2": 204,
    "swin_t": 29,
}


def drawn(norm: Any) -> Any:
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    return norm


@pytest.mark.parametrize("channels", [1, 8, 31, 48, 64, 80, 1088])
def test_a_batch_norm_becomes_a_group_norm_of_its_own_eps_and_weights(channels: int) -> None:
    old = drawn(nn.BatchNorm2d(channels, eps=1e-3))
    x = torch.randn(2, channels, 3, 3)
    expected = F.group_norm(x, math.gcd(32, channels), old.weight, old.bias, eps=1e-3)
    new = grouped(old)
    torch.testing.assert_close(new(x), expected, rtol=0, atol=0)
    assert set(new.state_dict()) == {"weight", "bias"}


def test_a_fused_batch_norm_still_drops_out_and_activates() -> None:
    old = drawn(BatchNormAct2d(64, eps=1e-3, drop_layer=lambda: nn.Dropout(0.5)))
    net = nn.Sequential(nn.Conv2d(3, 64, 1), old).train()
    x = torch.randn(4, 3, 8, 8)
    plain = F.group_norm(net[0](x), 32, old.weight, old.bias, eps=1e-3)
    names = {name for name in net.state_dict() if "running" not in name and "tracked" not in name}
    assert grouped(net) is net and set(net.state_dict()) == names
    assert net.training and net[1].training
    dropped = net(x) == 0
    assert 0.6 < dropped.float().mean() < 0.9  # half of the positive ones too
    torch.testing.assert_close(net.eval()(x), plain.relu(), rtol=0, atol=0)
    assert (plain < 0).any()


def test_a_norm_without_weights_stays_so() -> None:
    new = grouped(nn.BatchNorm1d(4, affine=False).eval())
    assert isinstance(new, GroupNormThen) and not list(new.parameters()) and not new.training


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_no_batch_norm_is_left_in_any_backbone(name: str) -> None:
    net = BACKBONES[name].builder()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    eps = {n: layer.eps for n, layer in norm_layers(net).items()}
    assert grouped(net) is net
    assert not batch_norms(net)
    assert {n: layer.eps for n, layer in norm_layers(net).items()} == eps
    assert len(eps) == COUNTS[name]
    after = dict(net.named_parameters())
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert not [n for n, _ in net.named_buffers() if "relative_position_index" not in n]


def test_norm_layers_are_named_and_of_all_kinds() -> None:
    net = nn.ModuleDict({"a": nn.BatchNorm2d(2), "b": nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)), "c": nn.ReLU()})
    net["d"] = nn.GroupNorm(1, 2)
    assert list(norm_layers(net)) == ["a", "b.0", "d"]
    assert list(batch_norms(net)) == ["a"]
