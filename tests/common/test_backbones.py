"""Backbones: every one with every norm trains, is reproducible and is the library's own network; the way of pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch
import torchvision.models
from torch import Tensor, nn

from rin.common import weights
from rin.common.backbones import BACKBONES, NORMALISATIONS, Network, build, initial, scaled
from rin.common.plan import IMAGE_SIZES, Model

# The library's own networks, built without rin.
STOCK = {
    "inception_v3": lambda: torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False),
    "inception_resnet_v2": lambda: timm.create_model("inception_resnet_v2", pretrained=False),
    **{
        name: lambda name=name: torchvision.models.get_model(name, weights=None)
        for name in ("resnet18", "resnet50", "densenet121", "swin_t")
    },
}


def model(**keys: object) -> Model:
    return Model.model_validate({"backbone": "resnet18", "image-size": 32, **keys})


def grey(n: int, side: int) -> Tensor:
    return torch.randint(0, 256, (n, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def smallest(name: str, norm: str = "batch") -> Model:
    return model(backbone=name, norm=norm, **{"image-size": IMAGE_SIZES[name].smallest})


KINDS = [(name, norm) for name in BACKBONES for norm in ("batch", "group") if (name, norm) != ("swin_t", "group")]


# One network after the other in memory: pytest runs all tests of one parameter before the next.
@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def net(request: Any) -> Network:
    return initial(smallest(*request.param), 0)


def test_the_plan_s_norm_changes_nothing_where_there_is_layer_norm_only() -> None:
    one, other = (initial(smallest("swin_t", norm), 0) for norm in ("batch", "group"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert str(one.backbone) == str(other.backbone)


def test_every_table_has_the_same_backbones() -> None:
    assert list(BACKBONES) == list(IMAGE_SIZES) == list(get_args(Model.model_fields["backbone"].annotation))
    assert all(name in STOCK for name in BACKBONES)


def test_a_seed_gives_the_same_bits_and_the_same_layout(net: Network) -> None:
    again = initial(net.model, 0)
    state = net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert weights.layout_of(net).header() == weights.layout_of(again).header()
    names = {tensor.name for tensor in weights.layout_of(net).tensors}
    assert ("head.weight" in names) and (net.model.norm == "batch" or not [n for n in names if "running" in n])


def test_a_weight_file_brings_back_a_network_of_group_norms(tmp_path: Path) -> None:
    net, other = initial(smallest("densenet121", "group"), 0), initial(smallest("densenet121", "group"), 1)
    weights.save(tmp_path / "a", net, weights.layout_of(net))
    weights.read_into(other, tmp_path / "a")
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in other.state_dict().items())


def test_the_maps_and_features_are_as_the_table_says(net: Network) -> None:
    net.eval()
    row, images = BACKBONES[net.model.backbone], grey(2, 64)
    with torch.inference_mode():
        maps, features = net.feature_maps(images), net.features(images)
    assert [found.shape[1] for found in maps] == list(row.channels)
    assert features.shape == (2, row.width)
    assert net(grey(1, 64)).shape == (1, 165)
    sides = [net.image_size / found.shape[2] for found in maps]
    strides = [2.0 ** (6 - len(maps) + i) for i in range(len(maps))]
    padded = net.image_size == 32  # networks that do not pad lose some pixels, most at the smallest size
    assert sides == strides if padded else all(a >= b for a, b in zip(sides, strides, strict=True))
    torch.testing.assert_close(maps[-1].mean((2, 3)), features)
    assert not net.backbone._forward_hooks and not any(part._forward_hooks for part in net.modules())


def test_an_image_s_logits_do_not_depend_on_the_others(net: Network) -> None:
    net.eval()
    images = grey(3, 64)
    with torch.inference_mode():
        together, alone = net(images), torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.equal(alone[0], alone[1])


def test_a_step_in_half_precision_reaches_every_parameter(net: Network) -> None:
    net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(net(grey(2, 64)), torch.tensor([0, 1]))
        loss.backward()
    wrong = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not wrong and loss.isfinite()


@pytest.mark.parametrize("name", list(BACKBONES))
def test_a_backbone_loads_into_the_library_s_network_and_agrees(name: str) -> None:
    net, stock = initial(smallest(name), 3).eval(), STOCK[name]().eval()
    missing, unexpected = stock.load_state_dict(net.backbone.state_dict(), strict=False)
    classifier = BACKBONES[name].classifier
    assert set(missing) == {f"{classifier}.weight", f"{classifier}.bias"} and not unexpected
    setattr(stock, classifier, nn.Identity())
    images = grey(2, net.image_size)
    rgb = ((images / 255 - 0.5) / 0.5).unsqueeze(1).expand(-1, 3, -1, -1)
    with torch.inference_mode():
        expected = stock(rgb.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(net.features(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["inception_v3", "inception_resnet_v2"])
def test_below_the_smallest_size_nothing_is_left_to_convolve(name: str) -> None:
    net = build(smallest(name), 2).eval()
    with pytest.raises(RuntimeError):
        net(torch.zeros(1, 1, 74, 74))


def test_initial_depends_on_the_seed_only_and_leaves_the_random_state() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = initial(model(), 1), initial(model(), 1), initial(model(), 2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.head.weight, same.head.weight)
    first = [net.get_parameter("backbone.conv1.weight") for net in (one, same, other)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


@pytest.mark.parametrize("name", sorted(NORMALISATIONS))
def test_normalisation_of_black_and_white(name: str) -> None:
    net = build(model(normalisation=name))
    images = torch.stack([torch.zeros(32, 32), torch.full((32, 32), 255)]).to(torch.uint8)
    out = net.normalised(images)
    mean, deviation = NORMALISATIONS[name]
    for channel in range(3):
        assert out[0, channel, 0, 0] == pytest.approx(-mean[channel] / deviation[channel], abs=1e-6)
        assert out[1, channel, 5, 5] == pytest.approx((1 - mean[channel]) / deviation[channel], abs=1e-6)
    assert "mean" not in net.state_dict()


def test_uint8_and_prepared_grey_give_the_same_logits() -> None:
    net = initial(model(), 0).eval()
    images = grey(3, 256)
    torch.testing.assert_close(net(images), net(scaled(images, 32)), rtol=0, atol=0)


@pytest.mark.parametrize(("side", "size"), [(256, 64), (256, 224), (64, 64), (48, 64)])
def test_scaled_keeps_range_mean_and_place(side: int, size: int) -> None:
    images = torch.zeros(1, side, side, dtype=torch.uint8)
    images[:, : side // 2] = 255
    out = scaled(images, size)
    assert out.shape == (1, 1, size, size)
    assert out[0, 0, : size // 4].min() == pytest.approx(1)
    assert out[0, 0, -size // 4 :].max() == pytest.approx(0, abs=1e-6)
    assert out.mean() == pytest.approx(0.5, abs=0.02)


def test_scaled_averages_the_cells() -> None:
    images = grey(1, 64)
    cell = images[0, :4, 4:8].double().mean() / 255
    assert scaled(images, 16)[0, 0, 0, 1].item() == pytest.approx(cell.item(), abs=1e-6)
