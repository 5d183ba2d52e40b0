import pytest
import torch
from torch import Tensor

from rin.common.augment import ERASED, MIRRORED, WINDOWED, Kinds, augment
from rin.common.batches import seeded
from rin.common.labels import label_index, label_set
from rin.common.plan import Augment

NOTHING = {"flip": "never", "shift": 0.0, "brightness": 0.0}


def only(**chosen: object) -> Augment:
    return Augment.model_validate(NOTHING | chosen)


def kinds(*names: str) -> Kinds:
    labels = torch.zeros(len(names), len(label_set()), dtype=torch.bool)
    labels[torch.arange(len(names)), [label_index()[name] for name in names]] = True
    return Kinds.of(labels)


def unknown(count: int) -> Kinds:
    return Kinds.unknown(count, torch.device("cpu"))


def picture(count: int = 1) -> Tensor:
    """Something without a symmetry, and black around it."""
    image = torch.zeros(count, 1, 64, 64)
    image[:, :, 16:48, 20:40] = torch.rand(32, 20, generator=seeded("pixels")) * 0.5 + 0.25
    return image


def test_the_tables_name_every_modality_and_anatomy() -> None:
    assert set(MIRRORED) == {(label.modality, label.anatomy) for label in label_set()}
    assert set(WINDOWED) == {label.modality for label in label_set()}


def test_an_image_is_mirrored_only_where_no_organ_has_a_side() -> None:
    image = picture()
    for name, mirrored in [("MR_knee_normal", True), ("CT_abd_normal", False), ("US_usabd_liver", False)]:
        found = augment(image.expand(64, -1, -1, -1), only(flip="anatomy"), kinds(*[name] * 64), seeded("a"))
        flipped = [bool(torch.equal(one, image[0].flip(2))) for one in found]
        assert (16 < sum(flipped) < 48) if mirrored else not any(flipped)
        assert all(flip or torch.equal(one, image[0]) for flip, one in zip(flipped, found, strict=True))
    both = torch.zeros(1, len(label_set()), dtype=torch.bool)
    both[0, [label_index()["CT_abd_normal"], label_index()["MR_knee_normal"]]] = True
    assert not Kinds.of(both).mirrored.any()
    many = image.expand(64, -1, -1, -1)
    for flip, expected in [("anatomy", 0), ("never", 0), ("always", 1)]:
        changed = augment(many, only(flip=flip), unknown(64), seeded("a")) != many
        assert bool(changed.any()) == bool(expected)


def test_a_mask_moves_with_its_image() -> None:
    image = torch.zeros(16, 1, 64, 64)
    image[:, :, 10:30, 5:20] = torch.rand(20, 15, generator=seeded("pixels")) * 0.5 + 0.25
    stack = torch.cat([image, (image > 0).float()], dim=1)
    moved = augment(stack, Augment(flip="always"), unknown(16), seeded("a"))
    assert moved.shape == (16, 2, 64, 64)
    bright, mask = moved[:, 0], moved[:, 1]
    assert torch.equal(bright > 0, mask == 1)  # nothing is smoothed, black stays black
    assert (mask.sum((1, 2)) == 300).all()
    gains = bright.sum((1, 2)) / image[0].sum()
    assert 0.84 < gains.min() < 0.95 < 1.05 < gains.max() < 1.16
    left = mask[:, :, :32].sum((1, 2)) > mask[:, :, 32:].sum((1, 2))
    assert 2 < left.sum() < 14  # flipped about half the time
    assert len({tuple(m.nonzero()[0].tolist()) for m in mask}) > 8  # and shifted
    values = (bright[0][mask[0] == 1] / gains[0]).sort().values
    torch.testing.assert_close(values, image[0][image[0] > 0].sort().values)


def test_shifts_reach_both_ways() -> None:
    dot = torch.zeros(400, 1, 32, 32)
    dot[:, :, 12, 15] = 0.5
    rows, columns = augment(dot, only(shift=0.0625), unknown(400), seeded("b"))[:, 0].nonzero()[:, 1:].T
    assert set(rows.tolist()) == {10, 11, 12, 13, 14}
    assert set(columns.tolist()) == {13, 14, 15, 16, 17}


def test_zoom_and_rotation_move_a_mask_with_its_image() -> None:
    stack = picture(64).expand(-1, 2, -1, -1)
    moved = augment(stack, only(zoom=0.2, rotation=30.0), unknown(64), seeded("c"))
    torch.testing.assert_close(moved[:, 0], moved[:, 1])  # the second channel is the same picture
    areas = (moved[:, 1] > 0.1).sum((1, 2)) / (stack[0, 0] > 0).sum()
    assert 0.6 < areas.min() < 0.8 < 1.2 < areas.max() < 1.5
    turned = augment(stack, only(rotation=30.0), unknown(64), seeded("c"))
    torch.testing.assert_close(turned.sum((1, 2, 3)), stack.sum((1, 2, 3)), rtol=0.03, atol=0.0)
    assert (turned[:, 0, 14, :].sum(1) > 0).sum() > 40  # a corner left the rows of the picture
    still = augment(stack, only(rotation=1e-6), unknown(64), seeded("c"))
    torch.testing.assert_close(still, stack, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("flip", ["never", "always"])
def test_the_resampled_way_shifts_and_mirrors_like_the_whole_pixels(flip: str) -> None:
    dot = torch.zeros(400, 1, 32, 32)
    dot[:, :, 12:14, 9:11] = 0.5
    found = augment(dot, only(shift=0.125, rotation=1e-6, flip=flip), unknown(400), seeded("d"))[:, 0]
    place = torch.arange(32.0)
    mass = found.sum((1, 2))
    rows, columns = (found.sum(2) * place).sum(1) / mass, (found.sum(1) * place).sum(1) / mass
    assert 8.4 < rows.min() < 9.4 and 15.6 < rows.max() < 16.6
    if flip == "never":
        assert 5.4 < columns.min() < 6.4 and 12.6 < columns.max() < 13.6
    else:
        assert 170 < (columns > 15.5).sum() < 230


def test_greys_change_by_modality() -> None:
    grey = torch.linspace(0, 1, 64).expand(3, 1, 64, 64)
    three = kinds("CT_lung_normal", "MR_brain_normal", "US_usthyroid_thyroid")
    windowed = augment(grey, only(window=0.2), three, seeded("e"))
    assert torch.equal(windowed[1:], grey[1:])
    assert not torch.equal(windowed[0], grey[0])
    inside = windowed[0, 0, 0][(windowed[0, 0, 0] > 0) & (windowed[0, 0, 0] < 1)]
    torch.testing.assert_close(inside.diff(), inside.diff()[0].expand(len(inside) - 1), rtol=1e-3, atol=1e-6)  # linear
    curved = augment(grey, only(gamma=0.5), three, seeded("e"))
    assert torch.equal(curved[0], grey[0])
    assert all((one.diff(dim=-1) > 0).all() and not torch.allclose(one, grey[0]) for one in curved[1:])
    for found in (windowed, curved):
        assert (found[..., 0] == 0).all() and 0 <= found.min() <= found.max() <= 1


def test_erasing_takes_a_rectangle_of_some_images_and_no_mask() -> None:
    stack = torch.full((200, 2, 32, 32), 0.5)
    found = augment(stack, only(erase=0.25), unknown(200), seeded("f"))
    assert torch.equal(found[:, 1], stack[:, 1])
    gone = found[:, 0] == 0
    some = gone.any(2).any(1)
    assert 30 < some.sum() < 70
    shares = gone[some].float().mean((1, 2))
    assert ERASED[0] * 0.5 < shares.min() < 0.05 < 0.15 < shares.max() < ERASED[1] * 1.2
    for one in gone[some]:
        rows, columns = one.any(1), one.any(0)
        assert one.sum() == rows.sum() * columns.sum()
        assert rows.nonzero().diff(dim=0).eq(1).all() and columns.nonzero().diff(dim=0).eq(1).all()


def test_one_option_does_not_change_what_another_draws() -> None:
    many = picture(16)
    alone = augment(many, only(shift=0.1), unknown(16), seeded("g"))
    beside = augment(many, only(shift=0.1, erase=1e-9, brightness=1e-9), unknown(16), seeded("g"))
    torch.testing.assert_close(alone, beside, rtol=1e-6, atol=0.0)
    assert torch.equal(alone, augment(many, only(shift=0.1), unknown(16), seeded("g")))
    assert not torch.equal(alone, augment(many, only(shift=0.1), unknown(16), seeded("h")))
