"""Which layers normalise, and group norm in place of batch norm."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the one base of all of them; torch has no public name for it

NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
LARGEST_GROUPS = 32  # groups of a layer (Wu and He 2018, "Group Normalization")


class GroupNormThen(nn.GroupNorm):
    """Group norm followed by the modules that were fused into the batch norm it replaces.

    timm's BatchNormAct2d drops out and activates by itself; its children keep their names here.
    """

    def __init__(self, groups: int, channels: int, *, eps: float, affine: bool, then: dict[str, nn.Module]) -> None:
        super().__init__(groups, channels, eps=eps, affine=affine)
        for name, module in then.items():
            self.add_module(name, module)

    def forward(self, input: Tensor) -> Tensor:
        """The normalised input, through the fused modules in their order; any shape (b, channels, ...)."""
        x = super().forward(input)
        for module in self.children():
            x = module(x)
        return x


def grouped(module: nn.Module) -> nn.Module:
    """`module` with every batch norm replaced, in place, by `GroupNorm(gcd(32, channels), channels)`.

    Subclasses of torch's `_BatchNorm` count too, such as timm's, which activate as well. Each layer keeps its name, eps
    and affine weights (Opacus's `ModuleValidator.fix` keeps neither, and overlooks timm's); running statistics go.
    A network without batch norm comes back as it is.
    """
    if isinstance(module, _BatchNorm):
        return _grouped(module)
    for name, child in list(module.named_children()):
        setattr(module, name, grouped(child))
    return module


def _grouped(norm: _BatchNorm) -> GroupNormThen:
    channels = norm.num_features
    groups = math.gcd(LARGEST_GROUPS, channels)
    new = GroupNormThen(groups, channels, eps=norm.eps, affine=norm.affine, then=dict(norm.named_children()))
    if norm.affine:
        new.weight, new.bias = norm.weight, norm.bias
    return new.train(norm.training)


def norm_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every batch, group and layer norm of `module` by its dotted name, in the module's order."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, NORMS)}


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """The norms of `module` that hold running statistics, by dotted name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
