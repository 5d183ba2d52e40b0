"""A site's local steps of one round, on the site's device and within its limits."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rin.client import parallel
from rin.client.data import TrainingData
from rin.client.home import Home
from rin.client.site import Site
from rin.common.errors import RefusedError
from rin.common.plan import Plan

if TYPE_CHECKING:
    from rin.common.backbones import Network
    from rin.common.fit import FitResult
    from rin.common.layout import Layout


def images_of(home: Home, site: Site) -> TrainingData:
    """What the site trains on: its training split, or everything where it holds nothing back.

    Raises:
        StateError: nothing was ingested, or the cache is shorter than the catalog says.
    """
    return TrainingData.open(home, labels=site.labels.rows(), split="train" if site.archive.hold_out else None)


def room(plan: Plan, site: Site, layout: Layout) -> int:
    """Bytes that a round writes into its folder, at the most: a snapshot is replaced by a whole one beside it.

    It is the weights, what the optimizer keeps of each, and their mean where the plan takes one.
    """
    training = plan.training
    kept = {"adamw": 2, "sgd": 1}[training.optimizer] + bool(training.ema)
    between = 2 if site.device.processes > 1 else 0  # where several processes start, and what they end with
    return (2 * (1 + kept) + between) * layout.file_bytes


@dataclass(frozen=True, slots=True)
class Work:
    """A site's local steps of one round: by whose rules, on which images, and who watches.

    Attributes:
        folder: where a snapshot is kept on the way; an interrupted round goes on from there.
        progress: called after each step with steps done and all steps.
        cancelled: asked before each step; a code ends the work.
    """

    home: Home
    plan: Plan
    site: Site
    images: TrainingData
    round: int
    folder: Path
    progress: Callable[[int, int], None]
    cancelled: Callable[[], str]

    @property
    def private(self) -> bool:
        return self.plan.privacy.mode == "patient"

    @property
    def trains(self) -> bool:
        """Whether the round does more than measure: the closing one does not."""
        return self.round <= self.plan.training.rounds


def local_steps(network: Network, work: Work, *, name: str) -> FitResult:
    """Train `network`, which holds the weights that the round starts from, in place; interrupted, to the same bits.

    Args:
        name: what the round's snapshot is known by; one of another name is not taken up.

    Raises:
        RefusedError: the code of `work.cancelled`, no-data, not-finite, memory or device; policy for a private plan,
            which is not trained like this: see rin.client.private.
    """
    plan, site = work.plan, work.site
    if plan.privacy.mode != "none":
        raise RefusedError("policy", "the plan is private, and this training is not", step="choose another plan")
    from rin.common import fit
    from rin.common.snapshots import Snapshots

    if site.device.processes > 1:
        job = parallel.Job(home=work.home.root, plan=plan, site=site, round=work.round, name=name)
        return parallel.run(network, job, folder=work.folder, progress=work.progress, cancelled=work.cancelled)
    try:
        return fit.fit_round(
            network,
            work.images,
            plan,
            rows=site.labels.rows(),
            exhaustive_rows=site.labels.exhaustive_rows(),
            round=work.round,
            site=site.site,
            device=fit.pick_device(site.device.name),
            threads=site.device.threads,
            compile=site.device.compile,
            progress=work.progress,
            cancelled=lambda: bool(work.cancelled()),
            snapshots=Snapshots(work.folder / parallel.SNAPSHOT, name),
        )
    except RefusedError as error:
        if error.code == "cancelled":
            raise RefusedError(work.cancelled() or error.code) from None
        raise


def check(cancelled: Callable[[], str]) -> None:
    """End the work here if somebody wants it.

    Raises:
        RefusedError: with the code that `cancelled` gives.
    """
    if code := cancelled():
        raise RefusedError(code)


def limit_memory(site: Site) -> None:
    """Keep this process below `device.memory-gib`: its data on a CPU, its share of a GPU. None lifts the last limit."""
    import torch

    from rin.common.fit import pick_device

    device, gib = pick_device(site.device.name), site.device.memory_gib
    if device.type == "cpu":
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard if gib is None else int(gib * 2**30), hard))
    else:
        total = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if gib is None else min(1.0, gib * 2**30 / total)
        torch.cuda.set_per_process_memory_fraction(share, device)


def device_answers() -> bool:
    """Whether the device still does what this process tells it: after some faults it does so for a new process only.

    A GPU may be lost. A CPU's kernels are made for each shape, and none is made any more after one got no memory:
    so this asks for a shape that was hardly used before.
    """
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        width = 8 + time.monotonic_ns() // 1000 % 4096
        torch.nn.functional.conv2d(torch.zeros(2, 3, 8, width), torch.zeros(5, 3, 2, 2))
    except RuntimeError:
        return False
    return True


def release_memory(error: BaseException) -> None:
    """Give back what the round that ended with `error` holds: its frames, what hangs together in cycles, GPU memory."""
    import gc
    import traceback

    import torch

    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
