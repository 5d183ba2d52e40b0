"""Speed of the training loop: rin's `fit_round` against a bare loop and against the loop that a user would write.

    python -m tests.benchmarks.training [--device cuda] [--model resnet50 ...] [--steps 12]

All three train the same network on the same number of images in one process, a step of each in turn:

- rin: `fit_round` as a site runs it, on images of a memory-mapped cache, with loader, augmentation, counts and all;
- bare: forward, backward, step on one batch that lies on the device ready for the network, in rin's precision, memory
  format and optimizer, without determinism;
- plain: the same in float32 and torch's default memory format and optimizer.

On a CPU a step is CPU seconds with one torch thread; what rin's loader does while the others run counts as rin's. On a
GPU it is wall seconds over blocks of steps, and the table says images a second and their share of the bf16 peak that a
large matrix product reaches. Figures are medians of paired ratios after two steps of warm-up. Expect ten minutes on a
CPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rin.client.data import TrainingData
from rin.client.ingest.cache import Cache, Reading, map_shards
from rin.common.backbones import initial
from rin.common.fit import fit_round, half_precision, settle
from rin.common.labels import label_set, label_set_digest
from rin.common.plan import Plan

WARM: Final = 2  # blocks that do not count: kernels are chosen and memory is taken in them
CASES: Final = {"resnet50": (224, 4), "densenet121": (224, 4), "inception_v3": (299, 2)}  # pixels a side, images a step
CUDA_BATCH: Final = 256
CUDA_BLOCK: Final = 10  # steps between two looks at the clock


def cached(folder: Path, n: int) -> TrainingData:
    """`n` smooth random images in a real cache, one label each."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (n, 1, 16, 16)).astype(np.float32))
    pixels = F.interpolate(coarse, (256, 256), mode="bilinear").squeeze(1).to(torch.uint8).numpy()
    Cache(folder, slots=0).append([image.tobytes() for image in pixels])
    return TrainingData(
        patients_known=True,
        patient=np.arange(n),
        modality=np.full(n, "MR"),
        anatomy=np.full(n, "knee"),
        label_offsets=np.arange(n + 1),
        label_indices=rng.integers(0, len(label_set()), n),
        _slots=rng.permutation(n),
        _shards=tuple(map_shards(folder, slots=n)),
        _reading=Reading(folder / "cache.lock"),
    )


@dataclass
class Rival:
    """A loop over one resident batch."""

    step: Callable[[], None]
    blocks: list[float] = field(default_factory=list)


def rival(plan: Plan, device: torch.device, *, plain: bool) -> Rival:
    """The bare or the plain loop on its own copy of the plan's network."""
    model, batch = plan.model, plan.training.batch_size
    half = half_precision(device) and not plain
    layout = torch.contiguous_format if plain else torch.channels_last
    net: nn.Module = initial(model, 0).to(device, memory_format=layout).train()  # type: ignore[call-overload]
    body = nn.Sequential(net.backbone, net.head)  # type: ignore[arg-type]
    images = torch.randn(batch, 3, model.image_size, model.image_size, device=device).to(memory_format=layout)
    targets = torch.randint(len(label_set()), (batch,), device=device)
    rate, momentum = plan.training.learning_rate, plan.training.momentum
    optimizer = torch.optim.SGD(body.parameters(), rate, momentum, fused=None if plain else True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = F.cross_entropy(body(images), targets)
        loss.backward()
        optimizer.step()

    return Rival(step)


class Clock:
    """Times the rivals between rin's steps: `tick` is rin's progress callback."""

    def __init__(self, rivals: dict[str, Rival], device: torch.device, block: int) -> None:
        self.rivals, self.device, self.block = rivals, device, block
        self.ours: list[float] = []
        self.start = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def tick(self, done: int, total: int) -> None:
        if done % self.block:
            return
        self.ours.append(self._now() - self.start)
        torch.use_deterministic_algorithms(False)
        before, aside = self._now(), 0.0
        for each in self.rivals.values():
            # On a CPU a rival is the time of its own thread: the loader's is rin's.
            clock = self._now if self.device.type == "cuda" else time.thread_time
            begun = clock()
            for _ in range(self.block):
                each.step()
            each.blocks.append(clock() - begun)
            aside += each.blocks[-1]
        torch.use_deterministic_algorithms(True)
        self.start = before + aside


def measure(name: str, size: int, batch: int, device: torch.device, images: TrainingData, steps: int) -> str:
    """One line of the table."""
    block = CUDA_BLOCK if device.type == "cuda" else 1
    plan = Plan.model_validate(
        {
            "protocol": 1,
            "name": "speed",
            "label-set": label_set_digest(),
            "sites": {"siteA": 1.0, "siteB": 1.0, "siteC": 1.0},
            "model": {"backbone": name, "image-size": size},
            "training": {
                "rounds": 1,
                "local-steps": (steps + WARM) * block,
                "batch-size": batch,
                "learning-rate": 1e-4,
            },
        }
    )
    settle(device, 1)
    rivals = {kind: rival(plan, device, plain=kind == "plain") for kind in ("bare", "plain")}
    clock = Clock(rivals, device, block)
    rows = range(len(label_set()))
    network = initial(plan.model, 0)
    fit_round(network, images, plan, rows=rows, round=1, site="siteA", device=device, threads=1, progress=clock.tick)
    ours, bare, plain = (values[WARM:] for values in (clock.ours, rivals["bare"].blocks, rivals["plain"].blocks))
    rate = batch * block / statistics.median(ours)
    to_bare = statistics.median(b / a for a, b in zip(ours, bare, strict=True))
    to_plain = statistics.median(b / a for a, b in zip(ours, plain, strict=True))
    share = ""
    if device.type == "cuda":
        share = f"{rate * flops(network, size) / peak(device):.1%}"
    return f"| {name} | {size} | {batch} | {rate:.1f} | {to_bare:.3f} | {to_plain:.2f} | {share} |"


def flops(network: nn.Module, size: int) -> float:
    """Floating-point operations of one image's forward and backward: three times the forward's."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 1, size, size, device=next(network.parameters()).device))
    return 3.0 * counter.get_total_flops()


def peak(device: torch.device, side: int = 8192, repeats: int = 20) -> float:
    """bf16 operations a second of a large matrix product."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        torch.mm(a, b)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return 2.0 * side**3 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, default=12)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    unit = "s" if device.type == "cuda" else "CPU-s"
    print(f"| network | pixels | batch | rin, images/{unit} | to bare | to plain | of bf16 peak |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        images = cached(Path(folder), 64 if device.type == "cpu" else 4096)
        for name in asked.model:
            size, batch = CASES[name]
            batch = batch if device.type == "cpu" else CUDA_BATCH
            print(measure(name, size, batch, device, images, asked.steps), flush=True)


if __name__ == "__main__":
    main()
