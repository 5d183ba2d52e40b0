"""How a checkpoint is scored: fine-tuned from its weights and from random ones, by the same recipe, seeds and order."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from rin.common import fit, formats, metrics
from rin.common.backbones import Network, initial
from rin.common.batches import Order, sampled
from rin.common.errors import ConfigError
from rin.common.plan import Augment, Model
from rin.server.bench.datasets import SIDE, Dataset
from rin.server.bench.segment import UNet, mask_loss
from rin.server.bench.statistics import RESAMPLES, compare
from rin.server.bench.summary import TaskScore
from rin.server.bench.tasks import Task

AUGMENT: Final = Augment(flip="always")  # a task's targets say nothing about the anatomy
EXAMPLES: Final = 4  # test images whose predictions are kept for the report
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one fine-tuning said about the test images.

    Args:
        scores: float64 (images, classes) probabilities for AUC, (images,) Dice for Dice.
        examples: uint8 masks (EXAMPLES, 256, 256) of the images of `example_index` for Dice, else empty.
        seconds: of the fine-tuning, wall clock; 0 where nobody looked.
    """

    scores: npt.NDArray[np.float64]
    examples: npt.NDArray[np.uint8]
    seconds: float = 0.0


def load(path: Path, *, normalisation: str | None = None, image_size: int | None = None) -> Network:
    """The whole network of the weight file at `path`, of any layout, in evaluation mode.

    Raises:
        ConfigError, RefusedError: as `rin.common.formats.read`.
    """
    return formats.network_of(formats.read(path, normalisation=normalisation, image_size=image_size))


def start(model: Model, checkpoint: Path | None, *, classes: int, seed: int) -> Network:
    """A network with a fresh head, which depends on `seed` only, on the checkpoint's backbone or a random one.

    Args:
        model: of the checkpoint; it says what a foreign file does not.
    """
    network = initial(model, seed, classes)
    if checkpoint is not None:
        found = formats.read(checkpoint, normalisation=model.normalisation, image_size=model.image_size)
        dataclasses.replace(found, head={}).into(network)
    return network


def example_index(data: Dataset) -> npt.NDArray[np.int64]:
    """Which test images the report shows: evenly spaced over the test part, whatever was predicted on them."""
    test = np.flatnonzero(data.test)
    return test[np.linspace(0, len(test) - 1, min(EXAMPLES, len(test))).round().astype(np.int64)]


def fine_tune(
    model: Model, checkpoint: Path | None, task: Task, data: Dataset, *, seed: int, threads: int
) -> Prediction:
    """Fine-tune once, on the training part, and predict the test part.

    Args:
        checkpoint: start from its backbone; None starts from random weights.
        seed: of the head, of the random backbone, of order and augmentation: the same for both starts.

    Raises:
        RefusedError: bad-weights or not-finite.
    """
    device = fit.pick_device("auto")
    fit.settle(device, threads)
    network = start(model, checkpoint, classes=len(data.classes), seed=seed)
    if task.kind == "dice":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module: nn.Module = UNet(network)
        _train(module, network, task, data, data.masks, mask_loss, seed=seed, device=device)
        return _outlines(module.eval(), data, device)
    _train(network, network, task, data, data.targets, _class_loss, seed=seed, device=device)
    logits = fit.infer(network.eval(), data.images[data.test], device=device)
    scores = torch.from_numpy(logits).double().softmax(1).numpy()
    return Prediction(scores, np.empty((0, SIDE, SIDE), np.uint8))


def _class_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets)


def _train(
    module: nn.Module,
    network: Network,
    task: Task,
    data: Dataset,
    targets: npt.NDArray[Any] | None,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    seed: int,
    device: torch.device,
) -> None:
    """The task's recipe through the one training loop, in place."""
    if targets is None:
        raise ConfigError(f"{task.name} has no masks", step="choose a task of kind auc, or bring masks")
    train = np.flatnonzero(~data.test)
    tuning = task.tuning
    module.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    key = ("bench", task.name, seed)
    batches = partial(
        sampled,
        lambda index: (data.images[train[index]], targets[train[index]]),
        Order(len(train), min(tuning.batch_size, len(train)), key),
        key=key,
        size=network.image_size,
        device=device,
        options=AUGMENT,
    )
    steps = tuning.steps_for(len(train))
    recipe = fit.Recipe(
        steps=steps,
        learning_rate=tuning.learning_rate,
        optimizer="adamw",
        weight_decay=tuning.weight_decay,
        warmup_steps=steps // 10,
    )
    fit.fit(module, batches, loss, recipe, device=device, key=key)


def _outlines(module: nn.Module, data: Dataset, device: torch.device) -> Prediction:
    """Dice of every test image against its full-size mask, whatever the network's own image size."""
    assert data.masks is not None  # _train has looked

    def larger(images: Tensor) -> Tensor:
        return F.interpolate(module(images)[:, None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]

    def masks(index: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return fit.infer(larger, data.images[index], device=device) > 0

    test = np.flatnonzero(data.test)
    blocks = np.split(test, range(fit.EVAL_BATCH, len(test), fit.EVAL_BATCH))
    dice = [metrics.dice(masks(index), data.masks[index].astype(bool)) for index in blocks]
    return Prediction(np.concatenate(dice), masks(example_index(data)).astype(np.uint8))


def score(
    checkpoint: Path,
    task: Task,
    *,
    seeds: Sequence[int],
    threads: int = 1,
    progress: Progress = fit.silent,
) -> TaskScore:
    """Score one checkpoint on one task against random weights, in this process, storing nothing.

    Raises:
        ConfigError, RefusedError: the checkpoint or the task's images cannot be used.
    """
    begun, data, model = time.monotonic(), task.load(), formats.read(checkpoint).model
    done, found = 0, ([], [])
    for seed in seeds:
        for predictions, start_from in zip(found, (checkpoint, None), strict=True):
            predictions.append(fine_tune(model, start_from, task, data, seed=seed, threads=threads).scores)
            progress(done := done + 1, 2 * len(seeds))
    return compared(task, data, checkpoint.stem, *found, seconds=time.monotonic() - begun)


def compared(
    task: Task,
    data: Dataset,
    name: str,
    checkpoint: Sequence[npt.NDArray[np.float64]],
    random: Sequence[npt.NDArray[np.float64]],
    *,
    seconds: float,
) -> TaskScore:
    """The comparison of two starts from the scores of their seeds."""
    targets = data.targets[data.test] if task.kind == "auc" else None
    groups = None if data.groups is None else data.groups[data.test]
    result = compare(np.stack(checkpoint), np.stack(random), targets, groups=groups, resamples=RESAMPLES)
    return TaskScore(task.name, name, result, seconds)


def linear_probe(
    network: Network,
    train: npt.NDArray[np.uint8],
    targets: npt.NDArray[np.int64],
    test: npt.NDArray[np.uint8],
    *,
    threads: int = 1,
) -> npt.NDArray[np.float64]:
    """How much the frozen features tell: standardised, then a logistic regression (L2, C = 0.01).

    Args:
        train, test: uint8 (images, h, w).
        targets: int64 class of every training image.

    Returns:
        Probabilities float64 (test images, classes), columns in ascending order of the classes that occur in `targets`.
    """
    device = fit.pick_device("auto")
    fit.settle(device, threads)
    network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    features = [fit.infer(network.features, images, device=device).astype(np.float64) for images in (train, test)]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    return np.asarray(probe.fit(features[0], targets).predict_proba(features[1]), np.float64)
