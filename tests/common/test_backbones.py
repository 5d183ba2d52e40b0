import pytest
import torch
import torchvision.models
from torch import Tensor

from rin.common.backbones import BACKBONES, NORMALISATIONS, build, initial, scaled
from rin.common.plan import Model


def model(**keys: object) -> Model:
    return Model.model_validate({"backbone": "resnet18", "image-size": 32, **keys})


def grey(n: int, side: int) -> Tensor:
    return torch.randint(0, 256, (n, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_table_tells_width_and_channels(name: str) -> None:
    net = build(model(backbone=name)).eval()
    with torch.inference_mode():
        maps = net.feature_maps(grey(2, 64))
        features = net.features(grey(2, 64))
    assert [m.shape for m in maps] == [
        (2, c, 32 >> i, 32 >> i) for i, c in enumerate(BACKBONES[name].channels, start=1)
    ]
    assert features.shape == (2, BACKBONES[name].width)
    assert net(grey(1, 64)).shape == (1, 165)
    torch.testing.assert_close(maps[-1].mean((2, 3)), features)


def test_backbone_loads_into_torchvision_and_agrees() -> None:
    net = initial(model(), 3).eval()
    plain = torchvision.models.resnet18(weights=None).eval()
    state = {n.removeprefix("backbone."): v for n, v in net.state_dict().items() if n.startswith("backbone.")}
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert missing == ["fc.weight", "fc.bias"]
    assert unexpected == []
    plain.fc = torch.nn.Identity()  # type: ignore[assignment]
    images = grey(2, 32)
    rgb = ((images / 255 - 0.5) / 0.5).unsqueeze(1).expand(-1, 3, -1, -1)
    torch.testing.assert_close(net.features(images), plain(rgb))


def test_initial_depends_on_the_seed_only_and_leaves_the_random_state() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = initial(model(), 1), initial(model(), 1), initial(model(), 2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.head.weight, same.head.weight)
    assert torch.equal(one.backbone.conv1.weight, same.backbone.conv1.weight)
    assert not torch.equal(one.backbone.conv1.weight, other.backbone.conv1.weight)


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
