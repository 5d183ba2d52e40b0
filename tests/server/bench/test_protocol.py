"""Protocol: both starts share everything but the backbone; the checkpoint's own facts decide the network."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rin.common import weights
from rin.common.backbones import Network, initial
from rin.common.errors import ConfigError, RefusedError
from rin.common.plan import Model
from rin.server.bench.datasets import Dataset, phantom_dataset
from rin.server.bench.protocol import example_index, fine_tune, linear_probe, load, score, start
from rin.server.bench.tasks import FineTuning, Task

FACTS = {"backbone": "resnet18", "norm": "batch", "image_size": 32, "normalisation": "imagenet"}
TUNING = FineTuning(steps=4, batch_size=8, learning_rate=1e-3)


def model(facts: dict[str, Any] = FACTS) -> Model:
    return Model.model_validate({key.replace("_", "-"): value for key, value in facts.items()})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "round-0001.safetensors"
    network = initial(model(), 77)
    weights.save(path, network, weights.layout_of(network), facts={**FACTS, "round": 1})
    return path


def task(name: str, kind: Any) -> Task:
    return Task(name, kind, "", partial(phantom_dataset, name, train=10, test=12), TUNING)


def test_the_network_is_what_the_checkpoint_says(checkpoint: Path) -> None:
    network = load(checkpoint)
    assert network.model == model()
    assert network.image_size == 32
    assert network.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (None, "does not say its normalisation"),
        ({**FACTS, "backbone": "vit"}, "does not have"),
        ({**FACTS, "image_size": 9999}, "does not have"),
    ],
)
def test_weights_without_their_facts_are_not_guessed(tmp_path: Path, facts: dict[str, Any] | None, words: str) -> None:
    path = tmp_path / "weights.safetensors"
    network = initial(model(), 0, 2)
    weights.save(path, network, weights.layout_of(network), facts=facts)
    with pytest.raises(ConfigError, match=words):
        load(path)


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    network = initial(model(), 0, 2)
    weights.save(path, network, weights.layout_of(network), facts={**FACTS, "backbone": "resnet50"})
    with pytest.raises(RefusedError, match="something else"):
        load(path)


def test_a_foreign_backbone_is_fine_tuned_like_ours(checkpoint: Path, tmp_path: Path) -> None:
    network = load(checkpoint)
    torch.save({**network.backbone.state_dict(), "fc.weight": torch.zeros(3, 512)}, tmp_path / "w")
    ours, foreign = (start(model(), path, classes=165, seed=5) for path in (checkpoint, tmp_path / "w"))
    assert all(torch.equal(value, foreign.state_dict()[name]) for name, value in ours.state_dict().items())
    assert not torch.equal(ours.head.weight, network.head.weight)


def test_both_starts_share_the_head_and_differ_in_the_backbone(checkpoint: Path) -> None:
    ours, random = (start(model(), path, classes=3, seed=5) for path in (checkpoint, None))
    pretrained = load(checkpoint).backbone.state_dict()
    assert ours.head.weight.shape == (3, 512)
    assert torch.equal(ours.head.weight, random.head.weight)
    assert all(torch.equal(value, pretrained[name]) for name, value in ours.backbone.state_dict().items())
    assert not torch.equal(ours.backbone.get_parameter("conv1.weight"), random.backbone.get_parameter("conv1.weight"))
    other = start(model(), None, classes=3, seed=6)
    assert not torch.equal(other.head.weight, random.head.weight)
    assert not torch.equal(other.backbone.get_parameter("conv1.weight"), random.backbone.get_parameter("conv1.weight"))


@pytest.mark.parametrize(("name", "kind"), [("phantom-nodule", "auc"), ("phantom-lesion", "dice")])
def test_a_fine_tuning_is_a_function_of_its_seed(checkpoint: Path, name: str, kind: str) -> None:
    this = task(name, kind)
    data = this.load()
    once, again, other, random = (
        fine_tune(model(), path, this, data, seed=seed, threads=1)
        for path, seed in ((checkpoint, 0), (checkpoint, 0), (checkpoint, 1), (None, 0))
    )
    assert np.array_equal(once.scores, again.scores)
    assert not np.array_equal(once.scores, other.scores)
    assert not np.array_equal(once.scores, random.scores)
    assert once.scores.shape == ((12, 2) if kind == "auc" else (12,))
    assert ((once.scores >= 0) & (once.scores <= 1)).all()
    assert once.examples.shape == ((0 if kind == "auc" else 4), 256, 256)


def test_a_random_start_does_not_look_at_the_test_part(checkpoint: Path) -> None:
    this = task("phantom-nodule", "auc")
    data = this.load()
    images = data.images.copy()
    images[np.flatnonzero(data.test)[1:]] = 0
    spoilt = Dataset(images, 1 - data.targets * data.test, data.classes, data.test, data.facts)
    spoilt.targets[~data.test] = data.targets[~data.test]
    first, second = (fine_tune(model(), None, this, d, seed=0, threads=1).scores[0] for d in (data, spoilt))
    assert first == pytest.approx(second, abs=1e-6)


def test_a_task_without_masks_has_no_dice(checkpoint: Path) -> None:
    this = task("phantom-nodule", "dice")
    data = this.load()
    with pytest.raises(ConfigError, match="no masks"):
        fine_tune(
            model(),
            None,
            this,
            Dataset(data.images, data.targets, data.classes, data.test, data.facts),
            seed=0,
            threads=1,
        )


def test_the_same_weights_on_both_sides_differ_by_nothing(tmp_path: Path) -> None:
    """A checkpoint that is the random start of seed 0 must score exactly like it: the two ways share all else."""
    path = tmp_path / "same.safetensors"
    network = initial(model(), 0)
    network.backbone.load_state_dict(start(model(), None, classes=2, seed=0).backbone.state_dict())
    weights.save(path, network, weights.layout_of(network), facts=FACTS)
    seen: list[tuple[int, int]] = []
    found = score(path, task("phantom-nodule", "auc"), seeds=[0], progress=lambda done, all: seen.append((done, all)))
    assert found.comparison.difference.value == 0
    assert found.comparison.checkpoint == found.comparison.random
    assert found.verdict == "not clearly different"
    assert seen == [(1, 2), (2, 2)]


def test_examples_are_spread_over_the_test_part() -> None:
    test = np.arange(40) >= 10
    data = Dataset(np.zeros((40, 1, 1), np.uint8), np.zeros(40, np.int64), ("a",), test, {})
    assert example_index(data).tolist() == [10, 20, 29, 39]


def test_a_linear_probe_finds_what_the_features_hold() -> None:
    """Bright against dark is in every network's features; the probe must find it and keep the columns' order."""
    rng = np.random.default_rng(0)
    targets = rng.permutation(np.repeat([3, 8], 20))
    images = (rng.integers(0, 60, (40, 32, 32)) + 100 * (targets == 8)[:, None, None]).astype(np.uint8)
    network: Network = initial(model(), 0)
    found = linear_probe(network, images[:30], targets[:30], images[30:])
    assert found.shape == (10, 2)
    assert (found.argmax(axis=1) == (targets[30:] == 8)).all()
