"""What a step moves how: weights decay, and what is no weight does not, in every network."""

from __future__ import annotations

import pytest
import torch

from rin.common.backbones import BACKBONES, initial
from rin.common.plan import Model
from rin.common.recipe import Recipe, Stepper


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_weights_decay_and_nothing_else(backbone: str, norm: str) -> None:
    network = initial(Model.model_validate({"backbone": backbone, "norm": norm}), 0)
    parameters = dict(network.named_parameters())
    groups = Stepper(network, Recipe(steps=1, learning_rate=0.1)).optimizer.param_groups
    decayed = {value.data_ptr() for group in groups if group["weight_decay"] for value in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    for name, value in parameters.items():
        table = name.endswith("relative_position_bias_table")
        assert (value.data_ptr() in decayed) == (value.dim() >= 2 and not table), name
    assert any("bias_table" in name for name in parameters) == (backbone == "swin_t")


def test_a_table_of_biases_stays_where_nothing_moves_it() -> None:
    network = initial(Model.model_validate({"backbone": "swin_t"}), 0)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    stepper = Stepper(network, Recipe(steps=1, learning_rate=0.1, optimizer="adamw", weight_decay=0.5))
    for value in network.parameters():
        value.grad = torch.zeros_like(value)
    stepper(0)
    moved = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    assert "head.weight" in moved
    assert not [name for name in moved if "table" in name or name.endswith("bias") or ".norm" in name]
