"""Formats: every layout in and out, bit for bit; a file that is none of them is refused in words."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models.inception_resnet_v2 import InceptionResnetV2
from torch import Tensor, nn
from torchvision.models import densenet121, inception_v3, resnet18, resnet50, swin_t

from rin.common import formats, weights
from rin.common.backbones import BACKBONES, Network, initial
from rin.common.errors import ConfigError, RefusedError
from rin.common.keylayouts import CHILDREN, radimagenet_state, torchvision_state
from rin.common.labels import label_set_digest
from rin.common.plan import IMAGE_SIZES, Model
from tests.simulator import TINY

STOCK: dict[str, Any] = {
    "resnet18": lambda n: resnet18(num_classes=n),
    "resnet50": lambda n: resnet50(num_classes=n),
    "densenet121": lambda n: densenet121(num_classes=n),
    "inception_v3": lambda n: inception_v3(num_classes=n, aux_logits=False, init_weights=False),
    "inception_resnet_v2": lambda n: InceptionResnetV2(num_classes=n),
    "swin_t": lambda n: swin_t(num_classes=n),
}


def network(backbone: str, norm: str = "batch", seed: int = 3) -> Network:
    made = initial(Model.model_validate({"backbone": backbone, "norm": norm}), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in made.state_dict().items():
            if name.endswith(("running_mean", "running_var")):  # as after training, not the zeros and ones of the start
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return made


def same(found: dict[str, Tensor], wanted: Network) -> bool:
    state = {name: value for name, value in wanted.backbone.state_dict().items() if value.is_floating_point()}
    return found.keys() == state.keys() and all(torch.equal(found[name], value) for name, value in state.items())


def saved(path: Path, state: Any) -> Path:
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def stock() -> dict[str, Tensor]:
    return resnet18(num_classes=7).state_dict()


@pytest.mark.parametrize(
    ("backbone", "norm"), [*((each, "batch") for each in BACKBONES), ("resnet18", "group"), ("swin_t", "group")]
)
def test_our_files_come_back_bit_for_bit(tmp_path: Path, backbone: str, norm: str) -> None:
    made = network(backbone, norm)
    facts = {"backbone": backbone, "norm": norm, "image_size": 96, "normalisation": "imagenet", "start": ""}
    digest = weights.save(tmp_path / "w", made, weights.layout_of(made), facts=facts)
    found = formats.read(tmp_path / "w")
    assert (found.layout, found.facts, found.notes, found.digest()) == ("rin", facts, (), digest)
    assert found.model == Model.model_validate(
        {"backbone": backbone, "norm": norm, "image-size": 96, "normalisation": "imagenet"}
    )
    assert same(found.backbone, made)
    again = formats.network_of(found)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_torchvisions_layout_loads_into_the_stock_network_and_comes_back(tmp_path: Path, backbone: str) -> None:
    made = network(backbone)
    path = saved(tmp_path / "w", torchvision_state(made))
    other = STOCK[backbone](165).eval()
    other.load_state_dict(torch.load(path, weights_only=True), strict=True)
    side = IMAGE_SIZES[backbone].smallest
    images = torch.rand(1, 1, side, side)
    with torch.no_grad():
        assert torch.allclose(other(made.normalised(images)), made(images), atol=1e-5)
    found = formats.read(path)
    assert (found.layout, found.model.backbone, found.head) == ("torchvision", backbone, {})
    assert same(found.backbone, made)
    assert "dropped the classifier" in found.notes[0]
    save_file({name: value.contiguous() for name, value in torchvision_state(made).items()}, tmp_path / "s")
    assert formats.read(tmp_path / "s").digest() == found.digest()


class Release(nn.Module):
    """The wrapper of RadImageNet's PyTorch release: a Sequential of the first children of torchvision's network."""

    def __init__(self, source: nn.Module, children: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(source.children())[:children])

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


@pytest.mark.parametrize(
    ("backbone", "wrap"),
    [*((each, "plain") for each in CHILDREN), *(("resnet50", wrap) for wrap in ("module.", "state_dict", "bare"))],
)
def test_radimagenets_layout_gives_the_features_of_its_network(tmp_path: Path, backbone: str, wrap: str) -> None:
    torch.manual_seed(0)
    source = STOCK[backbone](1000)
    nn.init.normal_(next(iter(source.parameters())), std=0.1)
    source.train()(torch.rand(2, 3, 96, 96))  # running statistics that are not those of the start
    source.eval()
    state: Any = Release(source, CHILDREN[backbone]).state_dict()
    assert len(state) == {"resnet50": 318, "densenet121": 725, "inception_v3": 564}[backbone]
    if wrap == "module.":
        state = {f"module.{name}": value for name, value in state.items()}
    if wrap == "state_dict":
        state = {"epoch": 3, "state_dict": state}
    if wrap == "bare":
        state = {name.removeprefix("backbone."): value for name, value in state.items()}
    found = formats.read(saved(tmp_path / "w", state))
    assert (found.layout, found.notes) == ("radimagenet", ())
    assert (found.model.backbone, found.model.normalisation, found.model.image_size) == (backbone, "symmetric", 224)
    imported = formats.network_of(found)
    setattr(source, BACKBONES[backbone].classifier, nn.Identity())
    images = torch.rand(2, 1, 96, 96)
    with torch.no_grad():
        wanted = source((images * 2 - 1).expand(-1, 3, -1, -1))
        assert torch.allclose(imported.features(images), wanted, atol=1e-5)
        if wrap == "plain" and backbone != "densenet121":  # the release's DenseNet ends before its ReLU and pooling
            released = Release(source, CHILDREN[backbone]).eval()((images * 2 - 1).expand(-1, 3, -1, -1)).flatten(1)
            assert torch.allclose(imported.features(images), released, atol=1e-5)


@pytest.mark.parametrize("backbone", CHILDREN)
def test_radimagenets_layout_is_written_as_it_was_released(tmp_path: Path, backbone: str) -> None:
    made = network(backbone)
    state = radimagenet_state(made)
    release = Release(STOCK[backbone](1000), CHILDREN[backbone])
    release.load_state_dict(state, strict=True)
    found = formats.read(saved(tmp_path / "w", state))
    assert found.layout == "radimagenet"
    assert same(found.backbone, made)


def test_inceptions_auxiliary_classifier_shifts_the_indices_and_is_dropped(tmp_path: Path) -> None:
    source = inception_v3(num_classes=9, aux_logits=True, init_weights=False)
    release = formats.read(saved(tmp_path / "r", Release(source, 20).state_dict()))
    assert (release.layout, release.notes) == ("radimagenet", ("dropped the auxiliary classifier AuxLogits",))
    plain = formats.read(saved(tmp_path / "t", source.state_dict()))
    assert plain.notes[1:] == release.notes
    assert release.digest() == plain.digest()
    name = "Mixed_7a.branch3x3_1.conv.weight"
    assert torch.equal(plain.backbone[name], source.state_dict()[name])


def test_densenets_keys_of_2017_are_known(tmp_path: Path) -> None:
    state = densenet121().state_dict()
    old = {name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value for name, value in state.items()}
    assert old.keys() != state.keys()
    assert formats.read(saved(tmp_path / "o", old)).digest() == formats.read(saved(tmp_path / "n", state)).digest()
    both = old | {"features.denseblock1.denselayer1.norm1.weight": torch.ones(64)}
    with pytest.raises(RefusedError):
        formats.read(saved(tmp_path / "b", both))


def test_old_files_of_torch_save_and_other_precisions_are_read(tmp_path: Path, stock: dict[str, Tensor]) -> None:
    half = {name: value.half() if value.is_floating_point() else value for name, value in stock.items()}
    torch.save(half, tmp_path / "w", _use_new_zipfile_serialization=False)
    found = formats.read(tmp_path / "w", normalisation="symmetric", image_size=64)
    assert (found.model.normalisation, found.model.image_size) == ("symmetric", 64)
    assert torch.equal(found.backbone["conv1.weight"], half["conv1.weight"].float())
    assert "converted to float32" in found.notes[-1]


@pytest.mark.parametrize(
    ("backbone", "wanted", "size"),
    [("resnet18", "imagenet", 224), ("inception_v3", "symmetric", 299), ("inception_resnet_v2", "symmetric", 299)],
)
def test_a_foreign_file_is_taken_for_what_its_library_trained(
    tmp_path: Path, backbone: str, wanted: str, size: int
) -> None:
    found = formats.read(saved(tmp_path / "w", STOCK[backbone](10).state_dict()))
    assert (found.model.normalisation, found.model.image_size) == (wanted, size)


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(os.environ["RIN_TRAP"])),)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stock: dict[str, Tensor]
) -> None:
    monkeypatch.setenv("RIN_TRAP", str(tmp_path / "sprung"))
    saved(tmp_path / "zip", {**stock, "x": Trap()})
    torch.save({**stock, "x": Trap()}, tmp_path / "old", _use_new_zipfile_serialization=False)
    (tmp_path / "bare").write_bytes(pickle.dumps(Trap()))
    saved(tmp_path / "module", resnet18(num_classes=2))
    for name in ("zip", "old", "bare", "module"):
        with pytest.raises(RefusedError, match="could run code"):
            formats.read(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_keras_is_refused_with_the_way_out_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(RefusedError, match=r"version 1\.5") as caught:
        formats.read(path)
    assert "ResNet50.pt" in caught.value.step


def change(state: dict[str, Tensor], **values: Any) -> dict[str, Tensor]:
    return {**state, **values}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "bn1.running_var"}, "1 missing .bn1.running_var."),
        (lambda s: change(s, **{"layer1.0.conv1.weight": torch.zeros(3, 3)}), r"of another shape .layer1.*\(3, 3\)"),
        (lambda s: change(s, **{"conv1.extra": torch.zeros(3)}), "1 unknown .conv1.extra."),
        (lambda s: change(s, **{"conv1.weight": s["conv1.weight"] * float("nan")}), "NaN .* conv1.weight"),
        (lambda s: {k: v for k, v in s.items() if "conv2" not in k}, "8 missing .*, \\.\\.\\."),
        (lambda s: {"a\x1b[2J": torch.zeros(2)}, r"no known layout; its keys are a\?\[2J"),
        (lambda s: {}, "no known layout; its keys are none"),
        (lambda s: [torch.zeros(2)], "no state dict"),
        (lambda s: change(s, step=3), "no state dict"),
        (lambda s: change(s, **{"conv1.weight": s["conv1.weight"].to_sparse()}), "no state dict"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, stock: dict[str, Tensor], make: Any, words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        formats.read(saved(tmp_path / "w", make(stock)))


def test_resnet34_is_not_taken_for_a_smaller_network(tmp_path: Path) -> None:
    from torchvision.models import resnet34

    with pytest.raises(RefusedError, match=r"nearest to the torchvision layout of resnet18: .* unknown"):
        formats.read(saved(tmp_path / "w", resnet34().state_dict()))


def test_our_files_must_be_what_they_say(tmp_path: Path) -> None:
    made = network("resnet18")
    facts = {"backbone": "resnet18", "norm": "batch", "image_size": 64, "normalisation": "symmetric"}
    layout = weights.layout_of(made)
    for wrong in ({"backbone": "resnet50"}, {"norm": "group"}):
        weights.save(tmp_path / "w", made, layout, facts=facts | wrong)
        with pytest.raises(RefusedError, match="something else"):
            formats.read(tmp_path / "w")
    for wrong in ({"backbone": "vit"}, {"image_size": 9999}, {"normalisation": "caffe"}, {"norm": 3}):
        weights.save(tmp_path / "w", made, layout, facts=facts | wrong)
        with pytest.raises((ConfigError, RefusedError)):
            formats.read(tmp_path / "w")
    weights.save(tmp_path / "w", made, layout)
    with pytest.raises(ConfigError, match="does not say its normalisation"):
        formats.read(tmp_path / "w")
    assert formats.read(tmp_path / "w", normalisation="imagenet").model.normalisation == "imagenet"
    weights.save(tmp_path / "w", made, layout, facts=facts)
    with pytest.raises(ConfigError, match="says that its normalisation is symmetric"):
        formats.read(tmp_path / "w", normalisation="imagenet")
    assert formats.read(tmp_path / "w", image_size=64).model.image_size == 64
    with pytest.raises(ConfigError, match="64 pixels a side, not 96"):
        formats.read(tmp_path / "w", image_size=96)
    del facts["image_size"]
    weights.save(tmp_path / "w", made, layout, facts=facts)
    assert formats.read(tmp_path / "w", image_size=96).model.image_size == 96
    with pytest.raises(ConfigError, match="image-size") as caught:
        formats.read(tmp_path / "w", image_size=16)
    assert "--image-size" in caught.value.step
    with pytest.raises(ConfigError, match="caffe is not known"):
        formats.read(tmp_path / "w", normalisation="caffe")


@pytest.mark.parametrize(
    "wrong",
    [
        {"round": "three"},
        {"round": None},
        {"round": -1},
        {"normalisation": None},
        {"mean": ["a", "b", "c"]},
        {"mean": [0.5]},
        {"mean": [0.485, 0.456, 0.406]},
        {"deviation": [1, 1, 1]},
        {"updates": 5},
        {"backbone": ["resnet18"]},
        {"image_size": "64"},
        {"trained_labels": "all"},
        {"source": {"layout": 3, "file": "x"}},
    ],
)
def test_facts_of_other_types_or_against_each_other_are_refused(
    tmp_path: Path, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKBONES, "resnet18", TINY)
    formats._shapes.cache_clear()
    made = network("resnet18")
    facts: dict[str, Any] = {"backbone": "resnet18", "norm": "batch", "image_size": 64, "normalisation": "symmetric"}
    facts |= {"mean": [0.5, 0.5, 0.5], "deviation": [0.5, 0.5, 0.5], "round": 3, "updates": {}, "of another release": 1}
    weights.save(tmp_path / "w", made, weights.layout_of(made), facts=facts)
    assert formats.read(tmp_path / "w").all_facts() == {**facts, "layout": "rin"}
    weights.save(tmp_path / "w", made, weights.layout_of(made), facts=facts | wrong)
    with pytest.raises(RefusedError) as caught:
        formats.read(tmp_path / "w")
    assert caught.value.code == "bad-weights"
    formats._shapes.cache_clear()


def test_a_head_over_other_labels_is_dropped(tmp_path: Path) -> None:
    made = network("resnet18")
    facts = {"backbone": "resnet18", "norm": "batch", "image_size": 64, "normalisation": "symmetric"}
    weights.save(tmp_path / "w", made, weights.layout_of(made), facts=facts | {"label_set": label_set_digest()})
    assert torch.equal(formats.read(tmp_path / "w").head["bias"], made.head.bias)
    weights.save(tmp_path / "w", made, weights.layout_of(made), facts=facts | {"label_set": "00" * 32})
    found = formats.read(tmp_path / "w")
    assert not found.head
    assert "dropped the head of 165 rows" in found.notes[0]


@pytest.mark.parametrize("layout", ["torchvision", "radimagenet"])
def test_a_layout_that_cannot_say_the_network_is_refused(layout: str) -> None:
    write = {"torchvision": torchvision_state, "radimagenet": radimagenet_state}[layout]
    with pytest.raises(ConfigError, match="group norm"):
        write(network("resnet50", "group"))
    if layout == "radimagenet":
        with pytest.raises(ConfigError, match="has no resnet18"):
            write(network("resnet18"))


@given(
    data=st.binary(max_size=200),
    magic=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x00" * 8 + b"{"]),
)
@settings(max_examples=150, deadline=None)
def test_no_bytes_do_more_than_be_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, magic: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(magic + data)
    with pytest.raises(RefusedError):
        formats.read(path)


def test_a_cut_file_is_refused(tmp_path: Path, stock: dict[str, Tensor]) -> None:
    whole = saved(tmp_path / "w", stock).read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(RefusedError):
            formats.read(tmp_path / "cut")
    with pytest.raises(RefusedError, match="cannot be read"):
        formats.read(tmp_path / "absent")
