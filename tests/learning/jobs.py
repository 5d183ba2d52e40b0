"""The trainings of the learning test, as functions that a child process can run; they meet in one directory.

images(root, seed)      draws three sites' archives and a test set into root/<seed>/
federated(root, seed)   the whole round loop with real trainers; the others train by the same loop, alone
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch

from rin.client.data import TrainingData
from rin.client.home import Home
from rin.common import fit
from rin.common.backbones import BACKBONES, Network, build, initial
from rin.common.labels import label_index, label_set
from rin.common.metrics import macro_auc
from rin.common.plan import parse_plan
from rin.common.weights import read_into
from rin.server.bench import protocol
from rin.server.bench.tasks import TASKS
from rin.server.phantom import PHANTOM_LABELS, SITES, draw
from tests import simulator
from tests.learning import setup

SIDE: Final = 256  # of an image in the cache
NETWORK_SIDE: Final = 64
NETWORK: Final = setup.shallow((24, 48, 96, 96), NETWORK_SIDE)  # in place of resnet18, which learns too slowly here
IMAGES: Final = 1000  # of each site, for training
TEST: Final = 500  # of each site's scanners
ROUNDS: Final = 120
STEPS: Final = 10  # of each site and round: often averaged, the head keeps up
CPU: Final = torch.device("cpu")
ROWS: Final = sorted(label_index()[label] for label in PHANTOM_LABELS)
Pixels = npt.NDArray[np.uint8]


def plan_bytes(seed: int, rounds: int, steps: int) -> bytes:
    return setup.plan_bytes(sorted(SITES), seed, side=NETWORK_SIDE, rounds=rounds, steps=steps, momentum=0.5)


def drawn(site: str, n: int, seed: int) -> tuple[Pixels, list[tuple[int, ...]]]:
    """`n` images as after ingest, the labels of the site in turn."""
    cv2.setNumThreads(1)
    row = SITES[site]
    images, labels = np.zeros((n, SIDE, SIDE), np.uint8), []
    for i in range(n):
        label = row.labels[i % len(row.labels)]
        rng = np.random.default_rng([seed, sorted(SITES).index(site), i])
        images[i] = padded(draw(label, rng, row.scanners[label.partition("_")[0]]))
        labels.append((label_index()[label],))
    return images, labels


def padded(image: npt.NDArray[np.floating]) -> Pixels:
    """A square of 256 with the image's aspect kept, as ingest makes it of square pixels."""
    rows, columns = image.shape
    scale = SIDE / max(rows, columns)
    size = (round(columns * scale), round(rows * scale))
    out = np.zeros((SIDE, SIDE), np.float32)
    top, left = (SIDE - size[1]) // 2, (SIDE - size[0]) // 2
    out[top : top + size[1], left : left + size[0]] = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return np.round(out * 255).astype(np.uint8)


def images(root: Path, seed: int) -> None:
    """Homes that have ingested and joined, and the test set."""
    folder = root / str(seed)
    found = {site: drawn(site, IMAGES, seed) for site in sorted(SITES)}
    simulator.make(
        folder,
        {site: [simulator.Images(pixels, labels)] for site, (pixels, labels) in found.items()},
        {site: sorted({row for each in labels for row in each}) for site, (_, labels) in found.items()},
        plan_bytes(seed, ROUNDS, STEPS),
    )
    tests = [drawn(site, TEST, 1000 + seed) for site in sorted(SITES)]
    np.save(folder / "test.npy", np.concatenate([pixels for pixels, _ in tests]))
    np.save(folder / "test_labels.npy", np.array([each[0] for _, labels in tests for each in labels]))


@dataclass(frozen=True, slots=True)
class Held:
    """Several sites' images as one, see `rin.common.batches.Data`."""

    parts: Sequence[TrainingData]

    def __len__(self) -> int:
        return sum(part.n_images for part in self.parts)

    def batch(self, index: npt.NDArray[np.int64]) -> tuple[Pixels, npt.NDArray[np.bool_]]:
        edges = np.cumsum([0, *(part.n_images for part in self.parts)])
        pixels = np.empty((len(index), SIDE, SIDE), np.uint8)
        labels = np.empty((len(index), len(label_set())), bool)
        for part, first, last in zip(self.parts, edges, edges[1:], strict=False):
            here = (index >= first) & (index < last)
            pixels[here] = part.images(index[here] - first)
            labels[here] = part.targets(index[here] - first) > 0
        return pixels, labels


def held(root: Path, seed: int, sites: Sequence[str]) -> Held:
    return Held([TrainingData.open(Home(root / str(seed) / site), labels=ROWS, split="train") for site in sites])


def rows_of(sites: Sequence[str]) -> list[int]:
    return sorted({label_index()[label] for site in sites for label in SITES[site].labels})


def auc(network: Network, root: Path, seed: int) -> float:
    """Macro-AUC of the network's own head on the test set, every label against its modality and anatomy."""
    truth = np.load(root / str(seed) / "test_labels.npy")
    logits = fit.infer(network.eval(), np.load(root / str(seed) / "test.npy", mmap_mode="r"), device=CPU)[:, ROWS]
    return _macro(torch.from_numpy(logits).softmax(1).double().numpy(), ROWS, truth)


def probe(network: Network, root: Path, seed: int) -> float:
    """Macro-AUC of a linear probe over all labels, fitted on the images of all sites."""
    everything = held(root, seed, sorted(SITES))
    pixels, labels = everything.batch(np.arange(len(everything)))
    test = np.load(root / str(seed) / "test.npy", mmap_mode="r")
    scores = protocol.linear_probe(network, pixels, labels.argmax(1), test)
    return _macro(scores, ROWS, np.load(root / str(seed) / "test_labels.npy"))


def _macro(scores: npt.NDArray[np.float64], rows: Sequence[int], truth: npt.NDArray[np.int64]) -> float:
    wide = np.zeros((len(truth), len(label_set())))
    wide[:, rows] = scores
    labels = np.zeros(wide.shape, bool)
    labels[np.arange(len(truth)), truth] = True
    return macro_auc(wide, labels).mean


def federated(root: Path, seed: int) -> dict[str, Any]:
    """The plan's rounds; macro-AUC, probe, and the AUC task from its weights and from random ones."""
    simulator.hasten(pytest.MonkeyPatch())  # for the life of this process
    BACKBONES["resnet18"] = NETWORK
    made = simulator.reopened(root / str(seed))
    made.go()
    checkpoint = made.run.checkpoint(ROUNDS)
    network = build(made.plan.model)
    read_into(network, checkpoint)
    scored = protocol.score(checkpoint, TASKS["phantom-nodule"], seeds=[seed])
    return {"auc": auc(network, root, seed), "probe": probe(network, root, seed), "task": scored}


def alone(root: Path, seed: int, sites: Sequence[str], steps: int) -> Network:
    """One stretch of `steps` over the images of `sites` together, from the same start as the federation."""
    BACKBONES["resnet18"] = NETWORK
    plan = parse_plan(plan_bytes(seed, 1, steps))
    network = initial(plan.model, seed)
    data = held(root, seed, sites)
    fit.fit_round(network, data, plan, rows=rows_of(sites), round=1, site=sites[0], device=CPU, threads=1)
    return network


def pooled(root: Path, seed: int, steps: int) -> dict[str, Any]:
    """Training on all images in one place."""
    network = alone(root, seed, sorted(SITES), steps)
    return {"auc": auc(network, root, seed), "probe": probe(network, root, seed)}


def single(root: Path, seed: int, site: str) -> dict[str, Any]:
    """A site's own backbone, after as many steps as it takes in the federation."""
    return {"probe": probe(alone(root, seed, [site], ROUNDS * STEPS), root, seed)}
