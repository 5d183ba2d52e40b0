"""Phantom patients for the attack report, as the training loops read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt

from rin.common.accountant import Row, epsilon
from rin.common.labels import label_index, label_set, label_set_digest
from rin.common.plan import Plan
from rin.server.phantom import PHANTOM_LABELS, SITES, draw

Pixels = npt.NDArray[np.uint8]
ROWS: Final = sorted(label_index()[label] for label in PHANTOM_LABELS)  # head rows that the site declares
QUIET: Final = {"flip": "never", "shift": 0.0, "brightness": 0.0}  # no augmentation: what the attacker likes best


@dataclass(frozen=True, slots=True)
class Held:
    """Images of some patients, see `rin.common.batches.Data` and `rin.common.private.Patients`.

    Attributes:
        pixels: uint8 (n, side, side), the images of a patient side by side.
        rows: (n,) head row of each image's label.
        patient: (n,) whose each image is, ascending from 0.
    """

    pixels: Pixels
    rows: npt.NDArray[np.int64]
    patient: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, index: npt.NDArray[np.int64]) -> tuple[Pixels, npt.NDArray[np.bool_]]:
        return self.pixels[index], targets(self.rows[index])

    def only(self, patients: npt.NDArray[np.bool_]) -> Held:
        """The same without the patients that are False."""
        chosen = patients[self.patient]
        _, patient = np.unique(self.patient[chosen], return_inverse=True)
        return Held(self.pixels[chosen], self.rows[chosen], patient)


def targets(rows: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Bool (n, labels of the label set), one label an image."""
    found = np.zeros((len(rows), len(label_set())), bool)
    found[np.arange(len(rows)), rows] = True
    return found


def phantom(label: str, seed: Iterable[int], side: int) -> Pixels:
    """One image of `label`, uint8 (side, side), from the first phantom site's scanners, whatever that site lacks."""
    image = draw(label, np.random.default_rng(list(seed)), SITES["siteA"].scanners[label.partition("_")[0]])
    return np.round(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) * 255).astype(np.uint8)


def plan_of(side: int, *, augment: dict[str, Any] | None = None, **training: Any) -> Plan:
    """A plan of resnet18 with group norm, by plain SGD at a constant rate."""
    changed = {key.replace("_", "-"): value for key, value in training.items()}
    plain = {"rounds": 1, "momentum": 0.0, "weight-decay": 0.0, "schedule": "constant"}
    return Plan.model_validate(
        {
            "protocol": 1,
            "name": "attacked",
            "label-set": label_set_digest(),
            "sites": {"siteA": 1.0, "siteB": 1.0, "siteC": 1.0},
            "model": {"backbone": "resnet18", "norm": "group", "image-size": side},
            "training": {**plain, **changed},
            "augment": augment or {},
        }
    )


def sigma_for(budget: float, *, rate: float, steps: int, delta: float) -> float:
    """The smallest noise, in steps of 0.01, at which `steps` private steps cost at most `budget`."""
    low, high = 30, 10_000
    while low < high:
        middle = (low + high) // 2
        if epsilon([Row(middle / 100, rate, steps)], delta) <= budget:
            high = middle
        else:
            low = middle + 1
    return low / 100
