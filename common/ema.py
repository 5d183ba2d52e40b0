"""The exponential moving average of a stretch's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Average:
    """Averages the parameters and float buffers of `module` over its steps, newer ones weighing more.

    The mean after t steps is divided by what the shares of t steps sum up to (as Adam's are, Kingma and Ba 2015): where
    the stretch began counts for nothing, however short it is.

    Args:
        decay: 0 to 1; about 1 / (1 - decay) steps count.

    Attributes:
        tensors: the means, changed in place; part of a snapshot.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        state = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
        self._state, self._decay = state, decay
        self.tensors: dict[str, Tensor] = {f"ema/{name}": value.detach().clone() for name, value in state.items()}

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Take in the weights after local step `step` (from 1)."""
        share = (1 - self._decay) / (1 - self._decay**step)
        for mean, value in zip(self.tensors.values(), self._state.values(), strict=True):
            mean.lerp_(value, share)

    @torch.no_grad()
    def settle(self) -> None:
        """Give the module the means."""
        for mean, value in zip(self.tensors.values(), self._state.values(), strict=True):
            value.copy_(mean)
