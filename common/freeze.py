"""How much of a backbone stays as it came: the three levels of the RadImageNet paper's benchmark."""

from __future__ import annotations

from typing import Final, Literal

from rin.common.backbones import Network
from rin.common.norms import batch_norms

Level = Literal["none", "head", "top10"]

# What `top10` trains of each backbone, beside the head: modules or single parameters, by the library's names.
# The benchmark's scripts unfreeze `layers[-10:]` of the Keras networks, which is a different share of each; these are
# the same weights. Keras's Inception networks have batch norms without a weight, so only their biases train here;
# torch's ResNet50 has no convolution biases (2,560 parameters fewer). The scripts know neither resnet18 nor swin_t: the
# last block is what ten layers come to there, with the final norm where there is one.
TOP10: Final[dict[str, tuple[str, ...]]] = {
    "resnet18": ("layer4.1",),
    "resnet50": ("layer4.2.bn1", "layer4.2.conv2", "layer4.2.bn2", "layer4.2.conv3", "layer4.2.bn3"),
    "inception_v3": ("Mixed_7c.branch_pool.bn.bias",),  # 192 parameters: nearly a frozen backbone
    "densenet121": ("features.denseblock4.denselayer16", "features.norm5"),
    "inception_resnet_v2": ("block8.branch1.2.bn.bias", "block8.conv2d", "conv2d_7b.conv", "conv2d_7b.bn.bias"),
    "swin_t": ("features.7.1", "norm"),
}


def frozen(network: Network, level: Level) -> Network:
    """`network` with its frozen parameters marked so, in place; an earlier level is forgotten.

    `none` trains all, `head` the head only, `top10` the head and what `TOP10` names. A batch norm none of whose
    parameters trains stays in evaluation mode through every later `network.train()`, as Keras has it: its statistics do
    not move. Dropout and stochastic depth stay as they are in training, frozen or not, as in Keras.
    """
    kept = {"none": ("",), "head": (), "top10": TOP10[network.model.backbone]}[level]
    for name, parameter in network.backbone.named_parameters():
        parameter.requires_grad_(any(_covers(part, name) for part in kept))
    network.still = tuple(
        norm
        for norm in batch_norms(network.backbone).values()
        if not any(parameter.requires_grad for parameter in norm.parameters())
    )
    network.train(network.training)
    return network


def _covers(part: str, name: str) -> bool:
    """Whether the dotted `name` is `part` or lies in it; the empty part is the whole network."""
    return not part or name == part or name.startswith(f"{part}.")
