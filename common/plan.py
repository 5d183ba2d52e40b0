"""plan.toml: what a consortium agreed on; the same bytes everywhere, named by their digest."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rin.common.errors import ConfigError
from rin.common.labels import label_set_digest
from rin.common.settings import Table, parse_toml

PROTOCOL: Final = 1
SITE_NAME: Final = re.compile(r"[A-Za-z0-9-]{1,32}")

SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,32}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(gt=0)]
MetricName = Literal["loss", "top1", "top5", "images"]  # of a round's training batches
ScoreName = Literal["validation", "confusion", "auc"]  # of the held-out images, see rin.common.scores
FigureName = Literal[MetricName, ScoreName]


class Sides(NamedTuple):
    """Pixels a side: the network's `own`, of its paper, and the `smallest` that leaves its last feature map a pixel."""

    own: int
    smallest: int


# Here and not in rin.common.backbones.BACKBONES, which has the same keys: a plan is read without torch.
IMAGE_SIZES: Final[dict[str, Sides]] = {
    "resnet18": Sides(224, 32),
    "resnet50": Sides(224, 32),
    "inception_v3": Sides(299, 75),  # its convolutions do not pad
    "densenet121": Sides(224, 32),
    "inception_resnet_v2": Sides(299, 75),
    "swin_t": Sides(224, 32),
}


class Model(Table):
    """The network that every site trains."""

    backbone: Literal["resnet18", "resnet50", "inception_v3", "densenet121", "inception_resnet_v2", "swin_t"] = (
        "resnet50"
    )
    norm: Literal["batch", "group"] = "batch"  # swin_t has layer norm only, whatever is said here
    image_size: Annotated[int, Field(ge=32, le=512)] = 224  # pixels a side that it sees; left out: the backbone's own
    normalisation: Literal["symmetric", "imagenet"] = "symmetric"  # see rin.common.backbones.NORMALISATIONS
    target: Literal["single", "multi"] = "single"  # softmax over declared labels, or one sigmoid a label
    # Empty: random weights of training.seed; else the hex SHA-256 of the tensor bytes of what round 1 starts from, in
    # the layout of the wire.
    start: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    local_norms: bool = (
        False  # FedBN (Li et al. 2021): each site trains on with its own norm layers; see rin.client.norms
    )

    @model_validator(mode="before")
    @classmethod
    def _own_size(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "image-size" in values:
            return values
        sides = IMAGE_SIZES.get(str(values.get("backbone", "resnet50")))
        return values if sides is None else {**values, "image-size": sides.own}

    @field_validator("image_size")
    @classmethod
    def _large_enough(cls, size: int, info: ValidationInfo) -> int:
        backbone = info.data.get("backbone")  # absent where it is at fault itself
        if backbone is not None and size < IMAGE_SIZES[backbone].smallest:
            raise ValueError(f"at least {IMAGE_SIZES[backbone].smallest} pixels for {backbone}")
        return size


class Training(Table):
    """One round at a site."""

    rounds: Annotated[int, Field(ge=1, le=99_999)]
    local_steps: Annotated[int, Field(ge=1, le=1_000_000)]  # optimizer steps a site and round
    batch_size: Annotated[int, Field(ge=1, le=65_536)]
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Positive = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # sgd only
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    schedule: Literal["constant", "cosine"] = "cosine"  # over all rounds, not within one
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # of the whole federated run
    max_gradient_norm: Annotated[float, Field(ge=0)] = 0.0  # L2 over all gradients of a step; 0: they are not clipped
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of a target spread over the declared labels
    sampling: Literal["uniform", "balanced"] = "uniform"  # "balanced": a label first, then one of its images
    logit_adjustment: Annotated[float, Field(ge=0, le=4)] = 0.0  # tau of Menon et al. 2021, by the site's own counts
    mixup: Annotated[float, Field(ge=0, le=8)] = 0.0  # alpha of Zhang et al. 2018; 0: images are not mixed
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay of the mean of a round's weights; 0: its last weights
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    freeze: Literal["none", "head", "top10"] = "none"  # what stays as it came; see rin.common.freeze


class Augment(Table):
    """How training images are changed at every step; see rin.common.augment."""

    flip: Literal["anatomy", "always", "never"] = "anatomy"  # left-right, half of them; "anatomy": no organ has a side
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0625  # largest, in sides, both ways
    zoom: Annotated[float, Field(ge=0, le=0.9)] = 0.0  # largest, both ways
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0  # largest, in degrees both ways
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.15  # largest change of the gain, both ways
    window: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # CT: largest move of the window's lower edge, in widths
    gamma: Annotated[float, Field(ge=0, le=2)] = 0.0  # MR, US: largest log of the exponent, both ways
    erase: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of images that lose a rectangle


class Strategy(Table):
    """How updates become the next global weights; see rin.server.strategies.STRATEGIES."""

    name: Literal["fedavg", "fedavgm", "fedadam", "fedprox"] = "fedavg"
    server_learning_rate: Positive = 1.0
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # fedavgm only
    mu: Annotated[float, Field(ge=0)] = 0.0  # fedprox only: weight of the proximal term


class Limits(Table):
    """What a round accepts."""

    min_sites: Annotated[int, Field(ge=1)] = 3  # no aggregate, and no head row, of fewer sites is released (threat T8)
    quorum: Annotated[int, Field(ge=1)] = 3  # fewer counted updates fail the round aloud
    deadline_s: Positive = 86_400.0  # of one round, a duration
    retries: Annotated[int, Field(ge=0)] = 2  # how often a site's own failure in a round is asked again
    max_update_norm: Positive = 1e4  # L2 over the parameters; larger updates are clipped to it
    max_share: Annotated[float, Field(gt=0, le=1)] = 0.6  # largest share of one site in an aggregate


class Privacy(Table):
    """The mechanism that protects patients; see rin.common.private. `training.batch-size` has no part in it."""

    mode: Literal["none", "patient"] = "none"
    sigma: Annotated[float, Field(ge=0.3, le=1e4)] = 1.0  # noise on the sum of a step, in clip norms
    # Largest L2 norm of a patient's gradient. At 1e-45 float32 has a step left for the gradient and none for the noise.
    clip: Annotated[float, Field(ge=1e-6, le=1e4)] = 1.0
    patients: Annotated[int, Field(ge=1, le=10**7)] = 256  # of a site in a step: expected, not counted
    images: Annotated[int, Field(ge=1, le=1000)] = 4  # of a patient in a step, at most
    views: Annotated[int, Field(ge=1, le=64)] = 1  # how often each of them is augmented
    delta: Annotated[float, Field(gt=0, le=1e-2)] = 1e-5  # the largest that a site may account with


class Bench(Table):
    """What the coordinator scores."""

    tasks: tuple[str, ...] = ()
    seeds: Annotated[int, Field(ge=1, le=100)] = 3


class Retention(Table):
    """What stays on the coordinator's disk."""

    receipts: Literal["delete", "keep"] = "delete"  # once the aggregate is on disk; digests always stay
    checkpoints: Annotated[int, Field(ge=1)] = 3  # newest rounds kept beside the last


class Plan(Table):
    """The whole plan.

    Raises (through `read_plan`):
        ConfigError: with every fault of the file at once.
    """

    protocol: Literal[1]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9 ._-]{1,64}$")]
    label_set: Digest
    sites: dict[SiteName, Positive]  # site name to its public weight
    metrics: tuple[FigureName, ...] = ("loss", "top1", "top5", "images")
    model: Model = Model()
    training: Training
    augment: Augment = Augment()
    strategy: Strategy = Strategy()
    limits: Limits = Limits()
    privacy: Privacy = Privacy()
    bench: Bench = Bench()
    retention: Retention = Retention()

    @model_validator(mode="after")
    def _rules_between_keys(self) -> Plan:
        if self.label_set != label_set_digest():
            raise ValueError(f"label-set: this release holds label set {label_set_digest()}, got {self.label_set}")
        if len({site.lower() for site in self.sites}) != len(self.sites):
            raise ValueError("sites: names must differ in more than their case")
        if not self.sites:
            raise ValueError("sites: name at least one site")
        if self.limits.quorum > len(self.sites):
            raise ValueError(f"limits.quorum: {self.limits.quorum} of {len(self.sites)} sites can never be reached")
        if self.limits.min_sites > self.limits.quorum:
            raise ValueError("limits.quorum: must be at least limits.min-sites")
        if self.training.logit_adjustment and self.model.target != "single":
            raise ValueError('training.logit-adjustment: needs model.target = "single"')
        if self.training.logit_adjustment and self.training.sampling == "balanced":
            raise ValueError("training.logit-adjustment: balanced sampling has done that already; choose one of them")
        if self.privacy.mode == "patient":
            self._rules_of_private_training()
        if {"confusion", "auc"} & set(self.metrics) and "validation" not in self.metrics:
            raise ValueError("metrics: confusion and auc come with validation only")
        return self

    def _rules_of_private_training(self) -> None:
        """Nothing in a private step is computed from patients but the gradients of those drawn (threats T5, T6)."""
        training, faults = self.training, []
        if self.metrics:
            faults.append("metrics: no figure leaves a site in private training; say metrics = []")
        if self.model.norm != "group" and self.model.backbone != "swin_t":
            faults.append('model.norm: batch norm mixes patients; say norm = "group"')
        if training.sampling != "uniform":
            faults.append('training.sampling: patients are drawn by chance alone; say sampling = "uniform"')
        if training.mixup:
            faults.append("training.mixup: it mixes patients; say mixup = 0")
        if training.logit_adjustment:
            faults.append("training.logit-adjustment: it counts the site's labels; say logit-adjustment = 0")
        if self.strategy.name == "fedprox":
            faults.append("strategy.name: private steps have no proximal term; choose another strategy")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def last_round(self) -> int:
        """Number of the last round: of a closing one, if sites measure what the last training round has made."""
        closing = "validation" in self.metrics and self.privacy.mode == "none"
        return self.training.rounds + closing


def parse_plan(data: bytes, *, name: str = "plan.toml") -> Plan:
    """Plan from the bytes of a plan file.

    Raises:
        ConfigError: every fault at once.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{name}: not UTF-8 text", step="save it as UTF-8") from None
    return parse_toml(text, Plan, name=name)


def plan_digest(data: bytes) -> str:
    """Hex SHA-256 of the plan file's bytes: the name that sites pin and messages carry."""
    return hashlib.sha256(data).hexdigest()


def read_plan(path: Path) -> tuple[Plan, bytes]:
    """The plan at `path` and its exact bytes.

    Raises:
        ConfigError: missing or wrong.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing", step="run `rin-server init` or copy deploy/plan.example.toml") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", step="name the file of a plan") from None
    return parse_plan(data, name=path.name), data
