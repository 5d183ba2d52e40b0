"""Private training: patients drawn by Poisson sampling, one clip a patient, Gaussian noise once a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rin.common import bags
from rin.common.augment import Kinds, augment
from rin.common.backbones import Network, scaled
from rin.common.bags import Bag
from rin.common.batches import Data
from rin.common.ema import Average
from rin.common.errors import RefusedError
from rin.common.fit import faults, goal_of, half_precision, never, settle, silent
from rin.common.freeze import frozen
from rin.common.heads import Loss
from rin.common.noise import Source
from rin.common.norms import batch_norms
from rin.common.plan import Augment, Plan
from rin.common.recipe import Stepper, recipe_of, rows_of
from rin.common.snapshots import Held, Snapshots
from rin.common.weights import all_finite

Index = npt.NDArray[np.int64]

CHUNK: Final = 64  # images read at once: two chunks are in memory, whatever the number of patients drawn
SIDE_BY_SIDE: Final = 4  # images of several patients in one forward; more gain little
BLOCK: Final = 1 << 16  # values of a sum that stay in the processor's cache while a few patients are added
SQUARES: Final = 1 << 14  # values that are squared at once in float64, as far as they stay in it
TINY: Final = 1e-6  # keeps the factor of a gradient of norm 0 finite


class Patients(Data, Protocol):
    """Images that know whose they are."""

    @property
    def patient(self) -> Index:
        """(n,) the patient of each image, ascending from 0."""
        ...


@dataclass(frozen=True, slots=True)
class Mechanism:
    """What a private step does; all of it is public and nothing of it is computed from the patients.

    Attributes:
        rate: probability with which each patient is in a step, by itself.
        patients: what the sum over the patients of a step is divided by, their expected number.
        images: of a patient in a step, at most; their mean loss is the patient's.
        views: how often each of them is augmented.
        clip: largest L2 norm of a patient's gradient over all parameters.
        sigma: standard deviation of the noise on the sum, in units of `clip`.
    """

    rate: float
    patients: float
    images: int
    views: int
    clip: float
    sigma: float


class PatientGradients:
    """Leaves the gradient of a private step in the trainable parameters of `module` (Abadi et al. 2016).

    One plain forward and backward a patient takes any layer and needs one more copy of the parameters. Where
    `together`, a few patients share them (see `bags`), which on a CPU is faster. The unit is the patient (user-level
    privacy), whatever the number of images.

    Args:
        loss: from outputs and targets of one patient to a scalar, a mean.
        together: `bags.separable` has said that patients may be computed side by side.

    Attributes:
        skipped: patients whose gradient was not finite; they count for nothing and are never told outside the site.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        mechanism: Mechanism,
        source: Source,
        *,
        device: torch.device,
        half: bool = False,
        together: bool = False,
    ) -> None:
        self.skipped = 0
        self._module, self._loss, self._mechanism, self._source = module, loss, mechanism, source
        self._device, self._half, self._together = device, half, together
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._sums = [torch.zeros_like(p) for p in self._parameters]

    def add(self, *patients: Bag) -> None:
        """Take in one of the groups that `side_by_side` makes: each one's gradient, scaled down to the norm `clip`."""
        for some in self._gradients(patients):
            kept, factors = [], []
            for gradients in some:
                norm = math.sqrt(squared_norm(gradients).item())
                if not math.isfinite(norm):
                    self.skipped += 1  # left out, not multiplied by 0: 0 times infinity is no number
                    continue
                kept.append(gradients)
                factors.append(min(1.0, self._mechanism.clip / (norm + TINY)))
            for total, *mine in zip(self._sums, *kept, strict=True):
                _add(total, mine, factors)

    def _gradients(self, patients: Sequence[Bag]) -> Iterator[Sequence[Sequence[Tensor]]]:
        """Each patient's gradient, of a few at a time or of one."""
        if self._together and not any(map(_alone, patients)):
            wanted = self._module, self._loss, self._parameters, patients
            yield bags.gradients(*wanted, rows=SIDE_BY_SIDE, half=self._half)
            return
        for inputs, targets in patients:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
                value = self._loss(self._module(inputs), targets)
            yield [torch.autograd.grad(value, self._parameters, materialize_grads=True)]

    def rehearse(self, images: Tensor, targets: Tensor) -> None:
        """Compute the gradient of made-up images and forget it: where they do not fit, no patient is to show it."""
        for _ in self._gradients([(images, targets)]):
            pass

    @torch.no_grad()
    def settle(self) -> None:
        """End the step, also one without any patient: noise, the mean by the expected number, and empty sums."""
        scale = self._mechanism.sigma * self._mechanism.clip
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            if scale:
                flat = torch.from_numpy(self._source.normals(total.numel()))
                # Every value of the noise is drawn alike, so the order of memory does not matter.
                total.add_(flat.to(total.device, total.dtype).view_as(total), alpha=scale)
            parameter.grad = total.div(self._mechanism.patients)
            total.zero_()


def _add(total: Tensor, parts: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Add each of `parts` times its factor, through memory once for all of them."""
    if not parts:
        return
    size = BLOCK if total.device.type == "cpu" else total.numel()
    sums = rows_of(total, total).view(-1).split(size)  # a view: a copy would lose the sum
    flat = [rows_of(total, part).reshape(-1).split(size) for part in parts]
    for place, *blocks in zip(sums, *flat, strict=True):
        for block, factor in zip(blocks, factors, strict=True):
            place.add_(block, alpha=factor)


def squared_norm(values: Sequence[Tensor]) -> Tensor:
    """Sum of all squares, a float64 scalar on the device; not finite where a value is not.

    In float64 throughout: torch's norm of one float32 tensor of 16 million equal values is 0.9 % too small on a CPU,
    and as much a patient could move the sum beyond the clip.
    """
    parts = []
    for value in values:
        size = SQUARES if value.device.type == "cpu" else max(1, value.numel())
        for block in rows_of(value, value).reshape(-1).split(size):  # in the order of its memory
            wide = block.double()
            parts.append(wide.dot(wide))
    return torch.stack(parts).sum()


class Sampler:
    """The images of a private step: Poisson sampling over patients, then some images of each, from `source` only."""

    def __init__(self, patient: Index, mechanism: Mechanism, source: Source) -> None:
        self._firsts = np.searchsorted(patient, np.arange(int(patient[-1]) + 2 if len(patient) else 1))
        self._mechanism, self._source = mechanism, source

    def step(self) -> list[Index]:
        """The indices of the drawn images, one array a drawn patient."""
        patients = self._source.chosen(len(self._firsts) - 1, self._mechanism.rate)
        return [
            first + self._source.some(end - first, self._mechanism.images)
            for first, end in zip(self._firsts[patients].tolist(), self._firsts[patients + 1].tolist(), strict=True)
        ]


def chunks(drawn: Sequence[Index]) -> Iterator[list[Index]]:
    """`drawn` in parts of about `CHUNK` images, no patient cut in two."""
    part: list[Index] = []
    for one in drawn:
        if part and sum(map(len, part)) + len(one) > CHUNK:
            yield part
            part = []
        part.append(one)
    if part:
        yield part


def steps(
    data: Patients,
    mechanism: Mechanism,
    source: Source,
    *,
    size: int,
    device: torch.device,
    options: Augment,
) -> Iterator[Iterator[Bag]]:
    """The bags of one step after another, read by a thread while the device computes.

    Augmentation draws from `source` too. Seeded by the plan, whoever knows the seed would know what each place in a
    step draws; one patient more moves all later ones by a place, and so changes more than its own bag.
    """
    sampler = Sampler(data.patient, mechanism, source)
    with ThreadPoolExecutor(1, "patients") as thread:
        while True:
            generator = torch.Generator().manual_seed(source.seed())
            drawn = list(chunks(sampler.step()))
            yield _bags(data, drawn, mechanism.views, thread, generator, size=size, device=device, options=options)


def _bags(
    data: Patients,
    drawn: Sequence[list[Index]],
    views: int,
    thread: ThreadPoolExecutor,
    generator: torch.Generator,
    *,
    size: int,
    device: torch.device,
    options: Augment,
) -> Iterator[Bag]:
    """The patients of one step."""
    following = [thread.submit(data.batch, np.concatenate(part)) for part in drawn[:1]]
    for number, part in enumerate(drawn):
        read = following.pop().result()
        following = [thread.submit(data.batch, np.concatenate(part)) for part in drawn[number + 1 : number + 2]]
        images, labels = (torch.from_numpy(values).to(device).repeat_interleave(views, dim=0) for values in read)
        grey = augment(scaled(images, size), options, Kinds.of(labels), generator)
        sizes = [len(one) * views for one in part]
        yield from zip(grey.split(sizes), labels.split(sizes), strict=True)


def side_by_side(patients: Iterable[Bag]) -> Iterator[list[Bag]]:
    """`patients` in groups of at most `SIDE_BY_SIDE` images; who has more than half of that stands alone."""
    few: list[Bag] = []
    for one in patients:
        if _alone(one):
            yield [one]
            continue
        if sum(len(inputs) for inputs, _ in [*few, one]) > SIDE_BY_SIDE:
            yield few
            few = []
        few.append(one)
    if few:
        yield few


def _alone(patient: Bag) -> bool:
    """Whether a patient is taken alone: by the number of its own images, whoever else is drawn."""
    return 2 * len(patient[0]) > SIDE_BY_SIDE


@faults()
def fit_private(
    module: Network,
    data: Patients,
    plan: Plan,
    mechanism: Mechanism,
    *,
    rows: Sequence[int],
    exhaustive_rows: Sequence[int] = (),
    round: int,
    device: torch.device,
    threads: int,
    charge: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = silent,
    cancelled: Callable[[], bool] = never,
    snapshots: Snapshots | None = None,
) -> int:
    """One site's work in one private round: `plan.training.local_steps` on `module`, in place.

    Frozen parameters (`training.freeze`) take no part; a private head on a frozen backbone, private fine-tuning and
    private pretraining are this one path. Head rows outside `rows` come back as they were: which rows are declared is
    public. The randomness is new in every call, so no two calls give the same weights; a snapshot holds weights that
    have had their noise, and no key.

    Args:
        charge: called before the first step, when the snapshot to go on from is on the disk; it debits the round once.

    Returns:
        Patients that were left out because their gradient was not finite, in this call. It is of the patients, so it
        stays at the site.

    Raises:
        RefusedError: policy, for a network that would mix patients; cancelled, not-finite, memory or device.
    """
    check(module)
    settle(device, threads)
    frozen(module, plan.training.freeze)
    module.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    kept = {p: p.detach().clone() for p in module.head.parameters()}
    source, goal = Source(), goal_of(plan, data, rows, exhaustive_rows)
    recipe = recipe_of(plan, round)
    stepper, average = Stepper(module, recipe), Average(module, recipe.ema) if recipe.ema else None
    half = half_precision(device)
    together = side_by_side_fits(module, device, half=half)
    gradients = PatientGradients(module, goal, mechanism, source, device=device, half=half, together=together)
    # Memory must end here or not at all: later, its code would tell that somebody with many images is there.
    largest = torch.zeros(mechanism.images * mechanism.views, 1, module.image_size, module.image_size, device=device)
    gradients.rehearse(largest, torch.zeros(len(largest), len(module.head.bias), dtype=torch.bool, device=device))
    held = Held(module, stepper.optimizer, average.tensors if average else {})
    first = 0
    if snapshots is not None:
        first = snapshots.resume(held)
        if not first:
            snapshots.keep(0, held)  # whoever dies before the next one goes on inside the same debit
    charge()
    stream = steps(data, mechanism, source, size=module.image_size, device=device, options=plan.augment)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in range(first, recipe.steps):
            torch.manual_seed(source.seed())  # of dropout
            for few in side_by_side(next(stream)):
                if cancelled():
                    raise RefusedError("cancelled")
                gradients.add(*few)
            gradients.settle()
            stepper(step)
            if average is not None:
                average.after(step + 1)
            if snapshots is not None:
                snapshots.after(step + 1, held)
            progress(step + 1, recipe.steps)
    if average is not None:
        average.settle()
    if not all_finite(module):
        raise RefusedError("not-finite")
    undeclared = torch.ones(len(module.head.bias), dtype=torch.bool, device=device)
    undeclared[list(rows)] = False
    with torch.no_grad():
        for parameter, before in kept.items():
            parameter[undeclared] = before[undeclared]
    return gradients.skipped


def side_by_side_fits(module: Network, device: torch.device, *, half: bool) -> bool:
    """Whether patients may share a forward here, seen on made-up images. On GPUs that has not been measured."""
    if device.type != "cpu":
        return False
    draw = torch.Generator().manual_seed(0)  # nothing private: the images are noise
    made_up = torch.rand(SIDE_BY_SIDE, 1, module.image_size, module.image_size, generator=draw)
    return bags.separable(module, [p for p in module.parameters() if p.requires_grad], made_up, half=half)


def check(module: nn.Module) -> None:
    """See that no layer of `module` makes one patient's output depend on another's, or keeps statistics of them.

    Raises:
        RefusedError: policy, with the layers.
    """
    from opacus.validators import ModuleValidator

    found = list(batch_norms(module))
    faults_of = [str(error) for error in ModuleValidator.validate(module, strict=False)]
    if found or faults_of:
        raise RefusedError(
            "policy",
            f"private training cannot use these layers: {', '.join(found[:3]) or '; '.join(faults_of[:3])}",
            step='agree on a plan with model.norm = "group"',
        )
