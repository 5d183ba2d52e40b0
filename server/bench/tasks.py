"""The downstream tasks: one table row each, and rows made from an image folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

from rin.common.errors import ConfigError
from rin.server.bench.datasets import Dataset, image_folder_dataset, phantom_dataset

Kind = Literal["auc", "dice"]


@dataclass(frozen=True, slots=True)
class FineTuning:
    """How a task is fine-tuned: the same for every init, checkpoint and seed.

    Args:
        steps: optimizer steps (AdamW, cosine to zero after a tenth of warm-up), or more where `epochs` asks for more.
        batch_size: images a step, drawn without replacement epoch by epoch.
        learning_rate: peak.
        epochs: least number of passes over the training images, for data sets of any size.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.05
    epochs: int = 1

    def steps_for(self, images: int) -> int:
        """Optimizer steps on `images` training images."""
        return max(self.steps, self.epochs * images // self.batch_size)


@dataclass(frozen=True, slots=True)
class Task:
    """One downstream task: `kind` is the figure that is reported, `load` gives the images (may take seconds)."""

    name: str
    kind: Kind
    description: str
    load: Callable[[], Dataset]
    tuning: FineTuning


TASKS: Final[dict[str, Task]] = {
    "phantom-nodule": Task(
        "phantom-nodule",
        "auc",
        "Benign or malignant: is the nodule smooth or spiculated?",
        partial(phantom_dataset, "phantom-nodule", train=96, test=1000),
        FineTuning(steps=64, batch_size=16, learning_rate=1e-3),
    ),
    "phantom-lesion": Task(
        "phantom-lesion",
        "dice",
        "Outline of a spiculated lesion beside a smooth distractor",
        partial(phantom_dataset, "phantom-lesion", train=64, test=200),
        FineTuning(steps=96, batch_size=16, learning_rate=1e-3),
    ),
}


def image_folder_task(path: Path, name: str = "", *, kind: Kind = "auc") -> Task:
    """A task from `path/<class>/<image>`, named as the folder, or as the link to it that is given; `dice` wants
    `<image>_mask.png` beside the images.

    Raises:
        ConfigError: the name is taken or not of letters, digits, dot, dash and underscore.
    """
    name = name or Path(os.path.abspath(path)).name  # noqa: PTH100 - a link is another name
    if name in TASKS or not name.isascii() or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ConfigError(
            f"{name!r} cannot be a task's name: it is taken, or not of letters, digits, dot, dash and underscore",
            step=f"rename the folder, or pass a link to it (ln -s) of another name; taken: {', '.join(TASKS)}",
        )
    what = "Class of an image" if kind == "auc" else "Outline on an image"
    return Task(
        name,
        kind,
        f"{what} from the folder brought for this run",
        partial(image_folder_dataset, path, with_masks=kind == "dice"),
        FineTuning(steps=100, batch_size=32, learning_rate=1e-3, epochs=10),
    )


def named_tasks(names: list[str]) -> list[Task]:
    """Rows of `TASKS` by name.

    Raises:
        ConfigError: an unknown name.
    """
    if unknown := sorted(set(names) - set(TASKS)):
        raise ConfigError(f"unknown task {', '.join(unknown)}", step=f"choose from {', '.join(TASKS)}")
    return [TASKS[name] for name in names]
