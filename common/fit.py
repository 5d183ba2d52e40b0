"""The one training loop: a site's local steps, fine-tuning and U-Nets of the benchmark."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rin.common.backbones import Network
from rin.common.batches import Balanced, Batches, Data, Labelled, Order, mixed, sampled, seed_of
from rin.common.ema import Average
from rin.common.errors import CODES, DEVICE_STEPS, RefusedError, device_fault
from rin.common.freeze import frozen
from rin.common.gradients import Count, Gradients
from rin.common.heads import Loss, Multi, Single, log_prior
from rin.common.parallel import Ranks
from rin.common.plan import MetricName, Plan, Training
from rin.common.recipe import Recipe, Stepper, recipe_of
from rin.common.snapshots import Held, Snapshots
from rin.common.weights import all_finite

log = logging.getLogger(__name__)

CHECK_EVERY: Final = 50  # steps between two looks at whether the loss is finite: a look waits for a GPU
EVAL_BATCH: Final = 256


@dataclass(frozen=True, slots=True)
class FitResult:
    """Steps taken, and over all batches: mean `loss`; counts `top1`, `top5`, `images`."""

    steps: int
    metrics: dict[MetricName, float]


def never() -> bool:
    """Nobody cancels."""
    return False


def silent(done: int, total: int) -> None:
    """Nobody watches."""


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU; other names are torch's own."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half_precision(device: torch.device) -> bool:
    """Whether bf16 autocast pays on `device`: GPUs with bf16, CPUs whose instructions know it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # absent in older releases: float32 there
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def settle(device: torch.device, threads: int) -> None:
    """Fix what decides the bits of a sum: the thread count, and deterministic kernels (no cost on a CPU)."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs a pass over memory


@contextlib.contextmanager
def faults() -> Iterator[None]:
    """Turn a device that is full or failed into a refusal with its code; any other error passes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        code = device_fault(error)
        if not code:
            raise
        log.error("%s: %s", CODES[code], str(error).partition("\n")[0])
        raise RefusedError(code, step=DEVICE_STEPS[code]) from None


@faults()
def fit(
    module: nn.Module,
    batches: Batches,
    loss: Loss,
    recipe: Recipe,
    *,
    device: torch.device,
    key: tuple[str | int, ...],
    count: Count | None = len,
    compile: bool = False,
    adjust: Callable[[], None] | None = None,
    progress: Callable[[int, int], None] = silent,
    cancelled: Callable[[], bool] = never,
    carried: Mapping[str, Tensor] | None = None,
    snapshots: Snapshots | None = None,
) -> float:
    """Take `recipe.steps` optimizer steps on `module`, which stays in its mode and on its device.

    A batch that does not fit into the device's memory is taken in parts, see `Gradients`.

    Args:
        batches: inputs and targets on `device` from a step on, as a function of the step alone.
        loss: from outputs and targets to a scalar, a mean.
        key: what random layers draw from, together with the step.
        count: what the mean of `loss` is taken over, from the targets; None: a batch is never taken in parts.
        compile: whether torch.compile makes the forward and backward pass; the first step then takes a minute or more.
        adjust: called between backward and step, to change gradients.
        progress: called after each step with steps done and all steps.
        cancelled: asked before each step.
        carried: tensors that `loss` changes in place; they are part of a snapshot.
        snapshots: where the stretch is kept on the way; one that was interrupted goes on, to the same bits.

    Returns:
        Mean loss of the steps.

    Raises:
        RefusedError: cancelled; not-finite, for a loss or weights that are NaN or infinite; memory or device.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        stepper, sums = Stepper(module, recipe), dict(carried or {})
        forward = torch.compile(module, dynamic=False) if compile else module
        gradients = Gradients(module, forward, loss, count, sums.values(), device=device, half=half_precision(device))
        total = torch.zeros((), device=device)
        average = Average(module, recipe.ema) if recipe.ema else None
        means = average.tensors if average else {}
        held = Held(module, stepper.optimizer, {"loss": total, "parts": gradients.parts, **sums, **means})
        first = 0 if snapshots is None else snapshots.resume(held)
        stream = iter(batches(first))
        for step in range(first, recipe.steps):
            if cancelled():
                raise RefusedError("cancelled")
            try:
                total += gradients(*next(stream), seed_of(*key, "layers", step))
            except MemoryError:
                if snapshots is not None:
                    snapshots.keep(step, held)  # the next try begins with the parts found so far
                raise
            if adjust is not None:
                adjust()
            stepper(step)
            if average is not None:
                average.after(step + 1)
            if (step + 1) % CHECK_EVERY == 0 and not math.isfinite(total.item()):
                raise RefusedError("not-finite")
            if snapshots is not None:
                snapshots.after(step + 1, held)
            progress(step + 1, recipe.steps)
        if average is not None and recipe.steps:
            average.settle()
        if not (math.isfinite(total.item()) and all_finite(module)):
            raise RefusedError("not-finite")
    return total.item() / max(1, recipe.steps)


@faults()
def fit_round(
    module: Network,
    data: Data,
    plan: Plan,
    *,
    rows: Sequence[int],
    exhaustive_rows: Sequence[int] = (),
    round: int,
    site: str,
    device: torch.device,
    threads: int,
    compile: bool = False,
    progress: Callable[[int, int], None] = silent,
    cancelled: Callable[[], bool] = never,
    snapshots: Snapshots | None = None,
    ranks: Ranks | None = None,
) -> FitResult:
    """One site's work in one round: `plan.training.local_steps` on `module`, in place.

    Every draw derives from (plan seed, site, round) and the optimizer is new, so the same call on the same CPU type
    gives the same bits. Head rows outside `rows` come back as they were.

    Args:
        data: the training images that carry a declared label.
        rows, exhaustive_rows: head rows of the site's declared and of its exhaustive labels.
        compile: see `fit`.
        ranks: this process among several that do the work together, each on a `device` of its own.

    Raises:
        RefusedError: no-data, cancelled, not-finite, memory or device.
    """
    if len(data) == 0:
        raise RefusedError("no-data")
    settle(device, threads)
    frozen(module, plan.training.freeze)
    module.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    kept = {p: p.detach().clone() for p in module.head.parameters()}
    key = (plan.training.seed, site, round)
    goal = goal_of(plan, data, rows, exhaustive_rows)
    batches = _batches(plan, data, goal, key, size=module.image_size, device=device)
    trained, layers, loss = module, key, goal
    if ranks is not None:
        loss = ranks.loss(goal, goal.count)
        batches, trained, layers = ranks.slices(batches), ranks.wrapped(module), (*key, ranks.rank)
    tally = Tally(loss, goal.right, rows, device, summed=ranks.summed if ranks else None)
    adjust = _proximal(module, plan.strategy.mu) if plan.strategy.name == "fedprox" else None
    mean = fit(
        trained,
        batches,
        tally,
        recipe_of(plan, round),
        device=device,
        key=layers,
        count=goal.count if ranks is None else None,  # ranks would have to agree on the parts
        compile=compile,
        adjust=adjust,
        progress=progress,
        cancelled=cancelled,
        carried={"hits": tally.hits},
        snapshots=snapshots,
    )
    undeclared = torch.ones(len(module.head.bias), dtype=torch.bool, device=device)
    undeclared[list(rows)] = False
    with torch.no_grad():
        for parameter, before in kept.items():
            parameter[undeclared] = before[undeclared]  # weight decay moved them
    return FitResult(plan.training.local_steps, {"loss": mean, **tally.counts(plan.training)})


def goal_of(plan: Plan, data: Data, rows: Sequence[int], exhaustive_rows: Sequence[int]) -> Single | Multi:
    """The loss that the plan's training takes over the declared rows."""
    training = plan.training
    if plan.model.target == "multi":
        return Multi(rows, exhaustive_rows, smoothing=training.label_smoothing)
    offsets = None
    if training.logit_adjustment:
        known = _labelled(data)
        offsets = training.logit_adjustment * log_prior(known.label_offsets, known.label_indices, rows)
    return Single(rows, smoothing=training.label_smoothing, offsets=offsets)


def _batches(
    plan: Plan, data: Data, goal: Single | Multi, key: tuple[str | int, ...], *, size: int, device: torch.device
) -> Batches:
    """The batches of a round, as a function of the step."""
    training = plan.training
    order = Order(len(data), training.batch_size, key)
    if training.sampling == "balanced":
        order = Balanced(_labelled(data), training.batch_size, key)
    plain = partial(sampled, data.batch, order, key=key, size=size, device=device, options=plan.augment)
    return mixed(plain, goal.soft, training.mixup, key) if training.mixup else plain


def _labelled(data: Data) -> Labelled:
    if not isinstance(data, Labelled):
        raise TypeError("this sampling or loss needs data that knows its labels")
    return data


class Tally:
    """A loss that also counts hits; the counts stay on the device until they are asked for.

    Args:
        right: from the targets to the declared rows (b, rows) that are an image's label.
        summed: makes one rank's counts those of all.
    """

    def __init__(
        self,
        loss: Loss,
        right: Callable[[Tensor], Tensor],
        rows: Sequence[int],
        device: torch.device,
        *,
        summed: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.loss, self.right, self.summed = loss, right, summed
        self.rows = torch.tensor(rows, dtype=torch.long, device=device)
        self.hits = torch.zeros(2, dtype=torch.long, device=device)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            best = logits.index_select(1, self.rows).topk(min(5, len(self.rows)), dim=1).indices
            found = self.right(targets).gather(1, best)
            hits = torch.stack([found[:, 0].sum(), found.any(1).sum()])
            self.hits += hits if self.summed is None else self.summed(hits)
        return self.loss(logits, targets)

    def counts(self, training: Training) -> dict[MetricName, float]:
        top1, top5 = self.hits.tolist()
        images = training.local_steps * training.batch_size
        return {"top1": float(top1), "top5": float(top5), "images": float(images)}


def _proximal(module: nn.Module, mu: float) -> Callable[[], None]:
    """Adds the gradient of mu/2 |w - w0|^2, w0 being the weights now (FedProx, Li et al. 2020, equation 2)."""
    start = [(p, p.detach().clone()) for p in module.parameters() if p.requires_grad]

    def adjust() -> None:
        for parameter, before in start:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - before, alpha=mu)

    return adjust


@torch.inference_mode()
def infer(
    function: Callable[[Tensor], Tensor],
    images: npt.NDArray[np.uint8],
    *,
    device: torch.device,
    batch_size: int = EVAL_BATCH,
    cancelled: Callable[[], bool] = never,
) -> npt.NDArray[np.float32]:
    """`function` (a network in eval mode, or its `features`) over images uint8 (n, h, w), as float32 (n, ...).

    Raises:
        RefusedError: cancelled, asked before each batch.
    """
    parts: list[npt.NDArray[np.float32]] = []
    for start in range(0, len(images), batch_size):
        if cancelled():
            raise RefusedError("cancelled")
        # Mapped images are read-only, which torch does not support: those are copied.
        batch = torch.from_numpy(np.require(images[start : start + batch_size], requirements=["C", "W"])).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half_precision(device)):
            parts.append(function(batch).float().cpu().numpy())
    return np.concatenate(parts)
