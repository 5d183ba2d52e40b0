"""Key layouts of other people's weight files: what keys could mean, and the network's tensors under such keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from rin.common import backbones
from rin.common.backbones import Network
from rin.common.errors import ConfigError

CLASSIFIERS: Final = ("fc.", "classifier.", "head.", "classif.", "last_linear.")

# RadImageNet's PyTorch release: `backbone.<index>` over the first n children of torchvision's network.
CHILDREN: Final[dict[str, int]] = {"resnet50": 9, "densenet121": 1, "inception_v3": 20}
AUXILIARY: Final = "AuxLogits"  # with torchvision's default aux_logits=True it is child 15, and all later ones shift
AUXILIARY_INDEX: Final = 15

# torchvision's ImageNet files of 2017 write `denselayer1.norm.1.weight` for today's `denselayer1.norm1.weight`.
OLD_DENSENET: Final = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")


@dataclass(frozen=True, slots=True)
class Found:
    """A file's float tensors renamed to one layout's reading of them, before they are compared with the networks."""

    layout: str
    tensors: dict[str, Tensor]  # by the library's names
    head: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    backbone: str = ""  # the only network that this reading is of; empty: any


def children(backbone: str) -> list[str]:
    """Names of the children that RadImageNet's PyTorch release keeps of torchvision's network, in order."""
    with torch.device("meta"):
        network = backbones.BACKBONES[backbone].builder()
    names = [name for name, _ in network.named_children() if name != AUXILIARY]
    return names[: CHILDREN[backbone]]


def readings(tensors: dict[str, Tensor]) -> Iterator[Found]:
    """Every way in which the keys could be meant."""
    yield from _as_rin(tensors)
    yield from _as_radimagenet(tensors)
    yield from _as_torchvision(tensors)


def _as_rin(tensors: dict[str, Tensor]) -> Iterator[Found]:
    """`backbone.<library's name>`, and `head.weight`, `head.bias` or no head at all."""
    body = {key.removeprefix("backbone."): value for key, value in tensors.items() if key.startswith("backbone.")}
    head = {key.removeprefix("head."): value for key, value in tensors.items() if key.startswith("head.")}
    if any(key[:1].isdecimal() for key in body):  # RadImageNet's
        return
    if body and len(body) + len(head) == len(tensors) and set(head) in (set(), {"weight", "bias"}):
        fits = not head or (head["weight"].dim() == 2 and head["bias"].shape == head["weight"].shape[:1])
        if fits:
            yield Found("rin", body, head)


def _as_radimagenet(tensors: dict[str, Tensor]) -> Iterator[Found]:
    """`backbone.<child index>.<name>`, with or without `backbone.`; as released, and with AuxLogits in between."""
    plain = {key.removeprefix("backbone."): value for key, value in tensors.items()}
    if len(plain) < len(tensors):
        return
    indexed = {key: value for key, value in plain.items() if key.partition(".")[0].isdecimal()}
    dropped = sorted(set(plain) - set(indexed))
    if not indexed or any(not key.startswith(CLASSIFIERS) for key in dropped):
        return
    for backbone in CHILDREN:
        if backbone not in backbones.BACKBONES:
            continue
        names = children(backbone)
        notes = _dropped_notes(dropped)
        yield Found("radimagenet", _by_child(indexed, names), notes=notes, backbone=backbone)
        if backbone == "inception_v3":
            shifted = [*names[:AUXILIARY_INDEX], AUXILIARY, *names[AUXILIARY_INDEX:]]
            renamed = _by_child(indexed, shifted)
            kept = {key: value for key, value in renamed.items() if not key.startswith(f"{AUXILIARY}.")}
            if len(kept) < len(renamed):
                notes = (*notes, f"dropped the auxiliary classifier {AUXILIARY}")
                yield Found("radimagenet", kept, notes=notes, backbone=backbone)


def _by_child(tensors: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Child indices as names; an index beyond the children keeps its number and so fits nothing."""
    by_index = {str(index): name for index, name in enumerate(names)}
    renamed = {}
    for key, value in tensors.items():
        index, _, rest = key.partition(".")
        renamed[f"{by_index[index]}.{rest}" if index in by_index else key] = value
    return renamed


def _as_torchvision(tensors: dict[str, Tensor]) -> Iterator[Found]:
    """The library's own names; classifier and auxiliary classifier are dropped."""
    dropped = [key for key in tensors if key.startswith(CLASSIFIERS)]
    auxiliary = [key for key in tensors if key.startswith(f"{AUXILIARY}.")]
    kept = {
        OLD_DENSENET.sub(r"\1\2", key): value for key, value in tensors.items() if key not in {*dropped, *auxiliary}
    }
    if len(kept) + len(dropped) + len(auxiliary) < len(tensors):  # one key in both spellings
        return
    notes = _dropped_notes(dropped)
    if auxiliary:
        notes += (f"dropped the auxiliary classifier {AUXILIARY}",)
    yield Found("torchvision", kept, notes=notes)


def _dropped_notes(keys: list[str]) -> tuple[str, ...]:
    names = sorted({key.partition(".")[0] for key in keys})
    return tuple(f"dropped the classifier {name}: the order of its labels is not known" for name in names)


# --- writing layouts --------------------------------------------------------------------------------------------


def torchvision_state(network: Network, *, head: bool = True) -> dict[str, Tensor]:
    """The network under the keys of torchvision's (for inception_resnet_v2 timm's) own, its head as their classifier.

    It loads with `load_state_dict(strict=True)` into the stock network with as many classes as the head has rows, or,
    without `head`, with an identity as its classifier.

    Raises:
        ConfigError: group norm, which the stock networks do not have.
    """
    _stock(network, "torchvision")
    name_of_head = backbones.BACKBONES[network.model.backbone].classifier
    state = {name: value.detach() for name, value in network.backbone.state_dict().items()}
    if head:
        state |= {f"{name_of_head}.{name}": value.detach() for name, value in network.head.state_dict().items()}
    return state


def radimagenet_state(network: Network) -> dict[str, Tensor]:
    """The backbone under the keys of RadImageNet's PyTorch release, `backbone.<child index>...`; it has no head.

    Raises:
        ConfigError: the release has no such network.
    """
    _stock(network, "radimagenet")
    if network.model.backbone not in CHILDREN:
        raise ConfigError(
            f"RadImageNet's PyTorch release has no {network.model.backbone}, so its layout has no keys for it",
            step=f"choose another format; the layout exists for {', '.join(CHILDREN)}",
        )
    places = {name: index for index, name in enumerate(children(network.model.backbone))}
    renamed = {}
    for name, value in network.backbone.state_dict().items():
        child, _, rest = name.partition(".")
        renamed[f"backbone.{places[child]}.{rest}"] = value.detach()
    return renamed


def _stock(network: Network, layout: str) -> None:
    if any(isinstance(module, nn.GroupNorm) for module in network.backbone.modules()):
        raise ConfigError(
            f"the {layout} layout is of networks with batch norm; it cannot say group norm",
            step="choose the format safetensors or onnx",
        )
