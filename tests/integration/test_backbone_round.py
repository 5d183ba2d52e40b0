"""A paper's network through a whole round, homes to aggregate: what is frozen comes back as it was."""

from __future__ import annotations

from pathlib import Path

import torch

from rin.common.freeze import frozen
from rin.server.bench.protocol import load, start
from tests.simulator import make, plan_text, stripes

SITES = ("siteA", "siteB", "siteC")


def test_a_densenet_with_group_norm_and_its_last_layers(tmp_path: Path) -> None:
    plan = plan_text(
        SITES,
        model={"backbone": "densenet121", "norm": "group"},
        training={"rounds": 1, "local_steps": 8, "batch_size": 8, "freeze": "top10"},
    )
    images = {site: [stripes((0, 1), 48, seed)] for seed, site in enumerate(SITES)}
    consortium = make(tmp_path, images, dict.fromkeys(SITES, (0, 1)), plan)
    consortium.go()
    before, after = (load(consortium.run.checkpoint(number)) for number in (0, 1))
    moved = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert moved == {name for name, p in frozen(after, "top10").named_parameters() if p.requires_grad}
    tuned = start(consortium.plan.model, consortium.run.checkpoint(1), classes=2, seed=0)
    assert torch.equal(
        tuned.get_parameter("backbone.features.norm5.weight"), after.get_parameter("backbone.features.norm5.weight")
    )
