"""The trainings of the class-subset test, as functions that a child process can run; they meet in one directory.

Every picture shows two shapes. Three sites hold skewed classes and each knows some of them only: what else is on a
picture it does not say. `subset` sites declare the classes that they know; `plain` sites declare all, which is
federated averaging without the class-subset measures, and else the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch

from rin.client.data import TrainingData
from rin.client.home import Home
from rin.common import fit
from rin.common.backbones import BACKBONES, Network, build, initial
from rin.common.labels import label_set
from rin.common.metrics import macro_auc
from rin.common.plan import parse_plan
from rin.common.weights import read_into
from tests import simulator
from tests.learning import setup, shapes
from tests.learning.jobs import Held

ROWS: Final = (40, 41, 42, 43, 44, 45, 46, 47)  # eight labels of one anatomy: an AUC is within it
# Pictures at each site by their first shape: skewed. The kinds are those that the site knows.
COUNTS: Final = {
    "siteA": {0: 240, 1: 120, 2: 60, 3: 120, 4: 60},
    "siteB": {3: 60, 4: 240, 5: 120, 6: 60, 7: 120},
    "siteC": {0: 40, 1: 80, 2: 200, 5: 40, 6: 160, 7: 80},
}
TEST: Final = dict.fromkeys(range(len(shapes.SHAPES)), 125)
ROUNDS: Final = 200
STEPS: Final = 8
NETWORK: Final = setup.shallow((16, 32, 32), shapes.SIDE)
CPU: Final = torch.device("cpu")


def plan_bytes(seed: int, rounds: int, steps: int) -> bytes:
    return setup.plan_bytes(sorted(COUNTS), seed, side=shapes.SIDE, rounds=rounds, steps=steps, momentum=0.7)


def declared(site: str) -> list[int]:
    return [ROWS[kind] for kind in COUNTS[site]]


def federated(root: Path, seed: int, *, plain: bool) -> float:
    """Macro-AUC after the plan's rounds."""
    simulator.hasten(pytest.MonkeyPatch())  # for the life of this process
    BACKBONES["resnet18"] = NETWORK
    folder = root / f"{seed}-{'plain' if plain else 'subset'}"
    images = {site: [shapes.drawn(counts, counts, ROWS, (seed, i))] for i, (site, counts) in enumerate(COUNTS.items())}
    rows = {site: list(ROWS) if plain else declared(site) for site in COUNTS}
    made = simulator.make(folder, images, rows, plan_bytes(seed, ROUNDS, STEPS))
    made.go()
    network = build(made.plan.model)
    read_into(network, made.run.checkpoint(ROUNDS))
    return auc(network, seed)


def pooled(root: Path, seed: int, *, part: float = 1.0) -> float:
    """Macro-AUC after training in one place, every shape known, with `part` of the federation's images seen."""
    BACKBONES["resnet18"] = NETWORK
    plan = plan_bytes(seed, 1, int(part * ROUNDS * STEPS * len(COUNTS)))
    folder = root / f"{seed}-pooled-{part}"
    parts = []
    for i, (site, counts) in enumerate(COUNTS.items()):
        images = shapes.drawn(counts, range(len(ROWS)), ROWS, (seed, i))
        simulator.make_home(home := Home(folder / site), site, [images], ROWS, plan)
        parts.append(TrainingData.open(home, labels=ROWS, split="train"))
    network = initial(parse_plan(plan).model, seed)
    fit.fit_round(network, Held(parts), parse_plan(plan), rows=ROWS, round=1, site="siteA", device=CPU, threads=1)
    return auc(network, seed)


def auc(network: Network, seed: int) -> float:
    """Macro-AUC of the network's own head on pictures of all kinds."""
    test = shapes.drawn(TEST, range(len(ROWS)), ROWS, (seed, 99))
    logits = fit.infer(network.eval(), test.pixels, device=CPU)[:, ROWS]
    scores, labels = np.zeros((len(logits), len(label_set()))), np.zeros((len(logits), len(label_set())), bool)
    scores[:, ROWS] = torch.from_numpy(logits).double().softmax(1).numpy()
    for row, own in zip(labels, test.labels, strict=True):
        row[list(own)] = True
    return macro_auc(scores, labels).mean
