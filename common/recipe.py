"""How a stretch of training steps: learning rates, the optimizer, clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # the one base of all of them; torch has no public name for it

from rin.common.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How `fit` steps. `first_step` is where this stretch begins in a schedule of `total_steps`."""

    steps: int
    learning_rate: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9  # sgd only
    weight_decay: float = 1e-4  # on the weights of linear and convolutional layers, and on nothing else
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = 0
    first_step: int = 0
    total_steps: int = 0  # 0: `first_step + steps`
    max_gradient_norm: float = 0.0  # L2 over all gradients; 0: they are not clipped
    ema: float = 0.0  # decay of the mean of the weights that the stretch ends with; 0: the last ones

    def rate(self, step: int) -> float:
        """Learning rate of the local step `step` (from 0): linear warm-up, then constant or half a cosine to 0."""
        at, total = self.first_step + step, self.total_steps or self.first_step + self.steps
        if at < self.warmup_steps:
            return self.learning_rate * (at + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = min(1.0, (at - self.warmup_steps) / max(1, total - self.warmup_steps))
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def recipe_of(plan: Plan, round: int) -> Recipe:
    """The recipe of round `round` (from 1): its stretch of a schedule over the whole federated run."""
    training = plan.training
    return Recipe(
        steps=training.local_steps,
        learning_rate=training.learning_rate,
        optimizer=training.optimizer,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        schedule=training.schedule,
        warmup_steps=training.warmup_steps,
        first_step=(round - 1) * training.local_steps,
        total_steps=training.rounds * training.local_steps,
        max_gradient_norm=training.max_gradient_norm,
        ema=training.ema,
    )


class Stepper:
    """A new optimizer over the trainable parameters of `module`; nothing but weights of layers is decayed.

    Biases and norms are not, nor tables of them: the relative position biases of a Swin transformer.

    The optimizer sees row-major views of weights in channels_last: on a CPU its fused kernels copy anything else, which
    doubles their time.
    """

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        self._recipe = recipe
        trainable = [p for p in module.parameters() if p.requires_grad]
        self._pairs = [(p, rows_of(p, p.detach())) for p in trainable]
        layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear | _ConvNd))
        weights = {id(layer.weight) for layer in layers}
        groups = [
            {"params": [view for p, view in self._pairs if id(p) in weights], "weight_decay": recipe.weight_decay},
            {"params": [view for p, view in self._pairs if id(p) not in weights], "weight_decay": 0.0},
        ]
        if recipe.optimizer == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, fused=True)

    def __call__(self, step: int) -> None:
        """Move the parameters by their gradients, at the rate of the local step `step`."""
        if self._recipe.max_gradient_norm:
            nn.utils.clip_grad_norm_([parameter for parameter, _ in self._pairs], self._recipe.max_gradient_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._recipe.rate(step)
        for parameter, view in self._pairs:
            view.grad = None if parameter.grad is None else rows_of(parameter, parameter.grad)
        self.optimizer.step()
        for _, view in self._pairs:
            view.grad = None


def rows_of(parameter: Tensor, value: Tensor) -> Tensor:
    """`value`, shaped like `parameter`, as the contiguous view (o, h, w, i) where that is in channels_last."""
    if parameter.dim() != 4 or parameter.is_contiguous():
        return value
    return value.permute(0, 2, 3, 1)
