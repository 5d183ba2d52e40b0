"""Weight files of every known layout, recognised by their keys and shapes, and the network's tensors in each layout."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from rin.common import backbones
from rin.common.backbones import BackboneRow, Network, build, initial
from rin.common.errors import ConfigError, RefusedError
from rin.common.facts import check_facts
from rin.common.keylayouts import Found, readings
from rin.common.labels import label_set, label_set_digest
from rin.common.plan import Model
from rin.common.statedict import read_state

NAMED: Final = 4  # keys that a refusal names
KNOWN: Final = (
    "known are rin's safetensors, torchvision's keys (timm's for inception_resnet_v2) and RadImageNet's PyTorch release"
)

PREFIXES: Final = ("module.", "_orig_mod.")  # DataParallel, torch.compile
# What a file without facts was most likely trained with. torchvision's Inception undoes ImageNet's statistics inside
# (transform_input=True), so that its first convolution sees -1..1; timm's inception_resnet_v2 was trained on -1..1.
LIKELY: Final[dict[tuple[str, str], str]] = {
    ("torchvision", "inception_v3"): "symmetric",
    ("torchvision", "inception_resnet_v2"): "symmetric",
}
LIKELY_OF_LAYOUT: Final[dict[str, str]] = {"torchvision": "imagenet", "radimagenet": "symmetric"}
RADIMAGENET_SIDE: Final = 224  # pixels, for all its networks; elsewhere the backbone's own size is likely

NORM_NAMES: Final[tuple[str, ...]] = get_args(Model.model_fields["norm"].annotation)


@dataclass(frozen=True, slots=True)
class Weights:
    """What a weight file holds, whatever its layout.

    Attributes:
        layout: "rin", "torchvision" or "radimagenet".
        model: the network; normalisation and image size as the file or the caller says, else as the layout has them.
        backbone: float32 tensors by the library's names, complete for `model`.
        head: `weight` (165, width) and `bias` (165,) over this release's label set; empty where the file has none.
        facts: what the file says about itself; empty for foreign files.
        notes: what was dropped or assumed, in words.
    """

    layout: str
    model: Model
    backbone: dict[str, Tensor]
    head: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def named(self) -> dict[str, Tensor]:
        """All tensors under their names in our files, in file order."""
        both = {f"backbone.{name}": value for name, value in self.backbone.items()}
        both |= {f"head.{name}": value for name, value in self.head.items()}
        return dict(sorted(both.items()))

    def digest(self) -> str:
        """Hex SHA-256 of the tensor bytes as our own file would hold them."""
        sha = hashlib.sha256()
        for value in self.named().values():
            sha.update(np.ascontiguousarray(value.numpy(), dtype="<f4").data)
        return sha.hexdigest()

    def all_facts(self) -> dict[str, Any]:
        """What the file says about itself, completed by what its layout and the caller say."""
        mean, deviation = backbones.NORMALISATIONS[self.model.normalisation]
        known = {
            "backbone": self.model.backbone,
            "norm": self.model.norm,
            "image_size": self.model.image_size,
            "normalisation": self.model.normalisation,
            "mean": list(mean),
            "deviation": list(deviation),
            "layout": self.layout,
        }
        return {**known, **self.facts, "image_size": self.model.image_size}

    def into(self, network: Network) -> Network:
        """Copy the backbone into `network` of the same model, and the head where both have 165 rows."""
        state = network.backbone.state_dict()
        with torch.no_grad():
            for name, value in self.backbone.items():
                state[name].copy_(value)
            if self.head and network.head.weight.shape == self.head["weight"].shape:
                network.head.load_state_dict(self.head)
        return network


def read(path: Path, *, normalisation: str | None = None, image_size: int | None = None) -> Weights:
    """The weights at `path`, in any known layout; the file's name does not matter.

    Args:
        normalisation: one of NORMALISATIONS, what the network was trained with; None takes what the file says, or what
            files of its layout were trained with.
        image_size: pixels a side; None takes what the file says, or the backbone's own.

    Raises:
        ConfigError: the file says another normalisation or image size, or names a network that this release does not
            have.
        RefusedError: bad-weights or not-finite: unreadable, a pickle with more than tensors, Keras, an unknown layout,
            facts that are none, missing keys, wrong shapes, NaN.
    """
    tensors, said = read_state(path)
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    found, backbone, norm = _recognised(path.name, floats)
    facts = said if found.layout == "rin" else {}
    check_facts(path.name, facts)
    model = _model(path.name, found.layout, backbone, norm, facts, normalisation, image_size)
    head, notes = _head(found, facts)
    if any(value.dtype != torch.float32 for value in found.tensors.values()):
        notes += ("tensors of another precision were converted to float32",)
    body = {name: _plain(found.tensors[name]) for name in sorted(found.tensors)}
    bad = [name for name, value in (body | head).items() if not bool(value.isfinite().all())]
    if bad:
        raise RefusedError("not-finite", f"{path.name} holds NaN or infinite values in {_few(bad)}")
    return Weights(found.layout, model, body, head, facts, notes)


def network_of(weights: Weights) -> Network:
    """The network that `weights` describe, with them in it, in evaluation mode.

    Without a head in the file the network's is random.
    """
    return weights.into(build(weights.model)).eval()


def start_of(model: Model, seed: int, weights: Weights, name: str) -> Network:
    """Where a training of `model` begins: random weights of `seed`, with those of a file over them.

    Args:
        name: of the file, for the operator.

    Raises:
        ConfigError: the file is of another network.
    """
    found = weights.model
    if found.backbone != model.backbone or not same_keys(model.backbone, found.norm, model.norm):
        raise ConfigError(
            f"{name} is a {found.backbone} with {found.norm} norm, the plan's is a {model.backbone} with {model.norm} "
            "norm",
            step="choose other weights, or a plan of the same network",
        )
    if found.normalisation != model.normalisation:
        raise ConfigError(
            f"{name} was trained on inputs normalised as {found.normalisation}, the plan says {model.normalisation}",
            step=f'set model.normalisation = "{found.normalisation}" in the plan, or, for a file that does not say, '
            "pass --normalisation",
        )
    return weights.into(initial(model, seed))


def weights_of(network: Network) -> Weights:
    """What our own file of `network` would hold; the tensors are the network's, not copies."""
    backbone, head = (
        {name: _plain(value) for name, value in sorted(module.state_dict().items()) if value.is_floating_point()}
        for module in (network.backbone, network.head)
    )
    return Weights("rin", network.model, backbone, head)


def _head(found: Found, facts: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The head if its rows are this release's labels, and a note if it is not."""
    if not found.head:
        return {}, found.notes
    rows = len(found.head["weight"])
    if rows != len(label_set()) or facts.get("label_set", label_set_digest()) != label_set_digest():
        return {}, (*found.notes, f"dropped the head of {rows} rows: it is not over this release's label set")
    return {name: _plain(value) for name, value in found.head.items()}, found.notes


def _plain(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32).contiguous()


# --- recognising layouts ----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _shapes(row: BackboneRow, backbone: str, norm: str) -> dict[str, tuple[int, ...]]:
    """Float tensors of the backbone by name; `row` is there so that another row under the same name counts."""
    with torch.device("meta"):
        network = Network(_plan_model(backbone, norm), 1)
    return {
        name: tuple(value.shape) for name, value in network.backbone.state_dict().items() if value.is_floating_point()
    }


def _plan_model(backbone: str, norm: str) -> Model:
    return Model.model_validate({"backbone": backbone, "norm": norm})


def _expected(backbone: str, norm: str) -> dict[str, tuple[int, ...]]:
    return _shapes(backbones.BACKBONES[backbone], backbone, norm)


def _networks(only: str) -> Iterator[tuple[str, str]]:
    for backbone in [only] if only else backbones.BACKBONES:
        for norm in NORM_NAMES:
            yield backbone, norm


def _recognised(name: str, tensors: dict[str, Tensor]) -> tuple[Found, str, str]:
    """The reading of the file that fits a network, with the network's backbone and norm.

    Raises:
        RefusedError: bad-weights: no reading fits; the nearest network and the first keys that differ are named.
    """
    for prefix in PREFIXES:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    nearest: tuple[float, str] = (0.0, "")
    for found in readings(tensors):
        for backbone, norm in _networks(found.backbone):
            expected = _expected(backbone, norm)
            common = sum(found.tensors[key].shape == expected[key] for key in found.tensors.keys() & expected.keys())
            if common == len(expected) == len(found.tensors):
                return found, backbone, norm
            likeness = common / (len(expected) + len(found.tensors) - common)
            if 2 * common > len(expected) and likeness > nearest[0]:
                nearest = likeness, f"{found.layout} layout of {backbone}: {_difference(found.tensors, expected)}"
    if nearest[1]:
        raise RefusedError("bad-weights", f"{name} is nearest to the {nearest[1]}", step=f"check the file; {KNOWN}")
    raise RefusedError(
        "bad-weights", f"{name} is of no known layout; its keys are {_few(sorted(tensors)) or 'none'}", step=KNOWN
    )


def _difference(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> str:
    lists = {
        "missing": [key for key in expected if key not in tensors],
        "unknown": [key for key in tensors if key not in expected],
        "of another shape": [
            f"{key} {tuple(tensors[key].shape)} instead of {shape}"
            for key, shape in expected.items()
            if key in tensors and tensors[key].shape != shape
        ],
    }
    return "; ".join(f"{len(keys)} {what} ({_few(keys)})" for what, keys in lists.items() if keys)


def _few(keys: list[str]) -> str:
    """The first few keys; they come from a stranger's file, so nothing in them but printable text, and not much."""
    shown = ["".join(c if c.isprintable() else "?" for c in key[:80]) for key in keys[:NAMED]]
    return ", ".join(shown) + (", ..." if len(keys) > NAMED else "")


# --- what the network is ----------------------------------------------------------------------------------------


def _model(
    name: str,
    layout: str,
    backbone: str,
    norm: str,
    facts: Mapping[str, Any],
    normalisation: str | None,
    image_size: int | None,
) -> Model:
    """The network of the file; what it says about itself wins over what is likely, the caller fills what is missing."""
    said = {key.replace("_", "-"): value for key, value in facts.items()}
    if said.get("backbone", backbone) not in get_args(Model.model_fields["backbone"].annotation):
        raise ConfigError(f"{name} is of a network that this release does not have", step="install a newer release")
    other = said.get("backbone", backbone) != backbone
    if other or not same_keys(backbone, said.get("norm", norm), norm):
        raise RefusedError(
            "bad-weights", f"{name} holds {backbone} with {norm} norm and says that it is something else"
        )
    if normalisation is not None and normalisation not in backbones.NORMALISATIONS:
        raise ConfigError(
            f"normalisation {normalisation} is not known", step=f"choose one of {', '.join(backbones.NORMALISATIONS)}"
        )
    meant = said.get("normalisation")
    if meant and normalisation and meant != normalisation:
        raise ConfigError(
            f"{name} says that its normalisation is {meant}, not {normalisation}", step="leave --normalisation out"
        )
    chosen = meant or normalisation or LIKELY.get((layout, backbone)) or LIKELY_OF_LAYOUT.get(layout)
    if chosen is None:
        raise ConfigError(
            f"{name} does not say its normalisation",
            step=f"pass --normalisation: one of {', '.join(backbones.NORMALISATIONS)}",
        )
    _check_statistics(name, chosen, facts)
    if image_size and said.get("image-size", image_size) != image_size:
        raise ConfigError(
            f"{name} says that its images have {said['image-size']} pixels a side, not {image_size}",
            step="leave --image-size out",
        )
    known = {each.alias or key for key, each in Model.model_fields.items()} - {"start"}  # where it began says nothing
    values = {key: value for key, value in said.items() if key in known}
    values |= {"backbone": backbone, "norm": said.get("norm", norm), "normalisation": chosen}
    size = image_size or said.get("image-size") or (RADIMAGENET_SIDE if layout == "radimagenet" else None)
    values |= {"image-size": size} if size else {}
    try:
        return Model.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ConfigError(
            f"{name} is of a network that this release does not have: {faults}",
            step="choose another --image-size" if image_size else "install the release that wrote the file",
        ) from None


def _check_statistics(name: str, normalisation: str, facts: Mapping[str, Any]) -> None:
    """See that mean and deviation, where the file says them, are those of its normalisation.

    Raises:
        RefusedError: bad-weights.
    """
    known = backbones.NORMALISATIONS.get(normalisation)
    for key, values in zip(("mean", "deviation"), known or (), strict=False):
        if not np.allclose(facts.get(key, values), values, rtol=0, atol=1e-6):
            raise RefusedError(
                "bad-weights", f"{name} says that its normalisation is {normalisation}, and another {key}"
            )


def same_keys(backbone: str, norm: str, other: str) -> bool:
    """Whether two values of `norm` give the same tensors: equal ones, and any where there is nothing to replace."""
    if norm == other:
        return True
    return norm in NORM_NAMES and _expected(backbone, norm) == _expected(backbone, other)
