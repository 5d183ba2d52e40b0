"""The one training loop: a site's local steps, fine-tuning and U-Nets of the benchmark; and evaluation."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rin.common.backbones import Network
from rin.common.batches import Data, sampled, seed_of
from rin.common.errors import RefusedError
from rin.common.freeze import frozen
from rin.common.heads import LOSSES, Loss
from rin.common.metrics import top_counts
from rin.common.plan import MetricName, Plan, Training
from rin.common.snapshots import Held, Snapshots
from rin.common.weights import all_finite

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]  # the batches from a step on

CHECK_EVERY: Final = 50  # steps between two looks at whether the loss is finite: a look waits for a GPU
EVAL_BATCH: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How `fit` steps. `first_step` is where this stretch begins in a schedule of `total_steps`."""

    steps: int
    learning_rate: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9  # sgd only
    weight_decay: float = 1e-4  # on weights of two and more dimensions; biases and norms have none
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = 0
    first_step: int = 0
    total_steps: int = 0  # 0: `first_step + steps`

    def rate(self, step: int) -> float:
        """Learning rate of the local step `step` (from 0): linear warm-up, then constant or half a cosine to 0."""
        at, total = self.first_step + step, self.total_steps or self.first_step + self.steps
        if at < self.warmup_steps:
            return self.learning_rate * (at + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = min(1.0, (at - self.warmup_steps) / max(1, total - self.warmup_steps))
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True, slots=True)
class FitResult:
    """Steps taken, and over all batches: mean `loss`; counts `top1`, `top5`, `images`."""

    steps: int
    metrics: dict[MetricName, float]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Logits float32 and labels bool, both (n, n_labels); mean `loss`, counts `top1`, `top5`, `images`."""

    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.bool_]
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


def optimizer_of(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """A new optimizer over the trainable parameters of `module`; nothing is decayed but weights."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, fused=True)


def fit(
    module: nn.Module,
    batches: Batches,
    loss: Loss,
    recipe: Recipe,
    *,
    device: torch.device,
    key: tuple[str | int, ...],
    adjust: Callable[[], None] | None = None,
    progress: Callable[[int, int], None] = silent,
    cancelled: Callable[[], bool] = never,
    carried: Mapping[str, Tensor] | None = None,
    snapshots: Snapshots | None = None,
) -> float:
    """Take `recipe.steps` optimizer steps on `module`, which stays in its mode and on its device.

    Args:
        batches: inputs and targets on `device` from a step on, as a function of the step alone.
        loss: from outputs and targets to a scalar.
        key: what random layers draw from, together with the step.
        adjust: called between backward and step, to change gradients.
        progress: called after each step with steps done and all steps.
        cancelled: asked before each step.
        carried: tensors that `loss` changes in place; they are part of a snapshot.
        snapshots: where the stretch is kept on the way; one that was interrupted goes on, to the same bits.

    Returns:
        Mean loss of the steps.

    Raises:
        RefusedError: cancelled; not-finite, for a loss or weights that are NaN or infinite.
    """
    optimizer = optimizer_of(module, recipe)
    autocast = half_precision(device)
    total = torch.zeros((), device=device)
    held = Held(module, optimizer, {"loss": total, **(carried or {})})
    first = 0 if snapshots is None else snapshots.resume(held)
    stream = iter(batches(first))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in range(first, recipe.steps):
            if cancelled():
                raise RefusedError("cancelled")
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            inputs, targets = next(stream)
            torch.manual_seed(seed_of(*key, "layers", step))
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                value = loss(module(inputs), targets)
            value.backward()
            if adjust is not None:
                adjust()
            optimizer.step()
            total += value.detach()
            if (step + 1) % CHECK_EVERY == 0 and not math.isfinite(total.item()):
                raise RefusedError("not-finite")
            if snapshots is not None:
                snapshots.after(step + 1, held)
            progress(step + 1, recipe.steps)
    if not (math.isfinite(total.item()) and all_finite(module)):
        raise RefusedError("not-finite")
    return total.item() / max(1, recipe.steps)


def recipe_of(plan: Plan, round: int) -> Recipe:
    """The recipe of round `round` (from 1): its stretch of a schedule over the whole federated run."""
    training = plan.training
    return Recipe(
        steps=training.local_steps,
        learning_rate=training.learning_rate,
        optimizer=training.optimizer,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        schedule=training.schedule,
        warmup_steps=training.warmup_steps,
        first_step=(round - 1) * training.local_steps,
        total_steps=training.rounds * training.local_steps,
    )


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
    progress: Callable[[int, int], None] = silent,
    cancelled: Callable[[], bool] = never,
    snapshots: Snapshots | None = None,
) -> FitResult:
    """One site's work in one round: `plan.training.local_steps` on `module`, in place.

    Every draw derives from (plan seed, site, round) and the optimizer is new, so the same call on the same CPU type
    gives the same bits. Head rows outside `rows` come back as they were.

    Args:
        data: the training images that carry a declared label.
        rows, exhaustive_rows: head rows of the site's declared and of its exhaustive labels.

    Raises:
        RefusedError: no-data, cancelled, not-finite or memory.
    """
    if len(data) == 0:
        raise RefusedError("no-data")
    settle(device, threads)
    frozen(module, plan.training.freeze)
    module.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    kept = {p: p.detach().clone() for p in module.head.parameters()}
    key = (plan.training.seed, site, round)
    batches = partial(
        sampled,
        data.batch,
        len(data),
        batch_size=plan.training.batch_size,
        key=key,
        size=module.image_size,
        device=device,
    )
    tally = Tally(LOSSES[plan.model.target](rows, exhaustive_rows), rows, device)
    adjust = _proximal(module, plan.strategy.mu) if plan.strategy.name == "fedprox" else None
    with _memory():
        mean = fit(
            module,
            batches,
            tally,
            recipe_of(plan, round),
            device=device,
            key=key,
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


class Tally:
    """A loss that also counts hits; the counts stay on the device until they are asked for."""

    def __init__(self, loss: Loss, rows: Sequence[int], device: torch.device) -> None:
        self.loss = loss
        self.rows = torch.tensor(rows, dtype=torch.long, device=device)
        self.hits = torch.zeros(2, dtype=torch.long, device=device)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            best = logits.index_select(1, self.rows).topk(min(5, len(self.rows)), dim=1).indices
            found = labels.index_select(1, self.rows).gather(1, best)
            self.hits += torch.stack([found[:, 0].sum(), found.any(1).sum()])
        return self.loss(logits, labels)

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


@contextlib.contextmanager
def _memory() -> Iterator[None]:
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise RefusedError("memory") from None


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


def evaluate(
    module: Network,
    data: Data,
    plan: Plan,
    *,
    rows: Sequence[int],
    exhaustive_rows: Sequence[int] = (),
    device: torch.device,
    threads: int,
    cancelled: Callable[[], bool] = never,
) -> Evaluation:
    """Run `module` over all of `data`, without augmentation; counts and loss are over the declared `rows`.

    Raises:
        RefusedError: no-data, cancelled or memory.
    """
    if len(data) == 0:
        raise RefusedError("no-data")
    settle(device, threads)
    module.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    logits, labels = [], []
    for start in range(0, len(data), EVAL_BATCH):
        images, found = data.batch(np.arange(start, min(start + EVAL_BATCH, len(data))))
        with _memory():
            logits.append(infer(module, images, device=device, cancelled=cancelled))
        labels.append(found)
    every, known = np.concatenate(logits), np.concatenate(labels)
    loss = LOSSES[plan.model.target](rows, exhaustive_rows)(torch.from_numpy(every), torch.from_numpy(known))
    counts = top_counts(every, known, rows)
    metrics: dict[MetricName, float] = {"loss": loss.item()}
    metrics.update({"top1": counts["top1"], "top5": counts["top5"], "images": counts["images"]})
    return Evaluation(every, known, metrics)
