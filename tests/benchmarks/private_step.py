"""What a private step costs: against the plain step, and against Opacus's hooks and ghost clipping, in one run.

    python -m tests.benchmarks.private_step [--patients 32] [--images 1] [--half] [--steps 3]

ResNet50 with group norm at 224 pixels on one thread. CPU seconds, variants in turn, the least of the steps; every step
has clip, noise and optimizer. Opacus clips images, where rin clips patients, and needs a network without in-place
layers. Peak memory is that of a process of its own for each variant, without what the imports take.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import Bottleneck

from rin.common import fit
from rin.common.backbones import Network, initial
from rin.common.noise import Source
from rin.common.plan import Model
from rin.common.private import Mechanism, PatientGradients, side_by_side, side_by_side_fits
from rin.common.recipe import Recipe, Stepper

CPU: Final = torch.device("cpu")
SIDE: Final = 224
CLASSES: Final = 165
RECIPE: Final = Recipe(steps=1000, learning_rate=0.01)
Step = Callable[[], None]


def network() -> Network:
    model = Model.model_validate({"backbone": "resnet50", "norm": "group", "image-size": SIDE})
    return initial(model, 0).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]


def batch(patients: int, images: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(patients).repeat_interleave(images) % CLASSES
    return torch.rand(patients * images, 1, SIDE, SIDE, generator=draw), labels


def plain(patients: int, images: int, half: bool) -> Step:
    module, (x, y) = network(), batch(patients, images)
    stepper = Stepper(module, RECIPE)

    def step() -> None:
        module.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = nn.functional.cross_entropy(module(x), y)
        value.backward()
        stepper(0)

    return step


def rin(patients: int, images: int, half: bool) -> Step:
    module, (x, y) = network(), batch(patients, images)
    stepper = Stepper(module, RECIPE)
    gradients = PatientGradients(
        module,
        nn.functional.cross_entropy,
        Mechanism(rate=0.1, patients=float(patients), images=images, views=1, clip=1.0, sigma=1.0),
        Source(),
        device=CPU,
        half=half,
        together=side_by_side_fits(module, CPU, half=half),
    )

    def step() -> None:
        for few in side_by_side(zip(x.split(images), y.split(images), strict=True)):
            gradients.add(*few)
        gradients.settle()
        stepper(0)

    return step


def opacus(mode: str) -> Callable[[int, int, bool], Step]:
    """Opacus's engine in one of its modes."""

    def make(patients: int, images: int, half: bool) -> Step:
        module, (x, y) = network(), batch(patients, images)
        for layer in module.modules():
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        Bottleneck.forward = _out_of_place  # of this process; `opacus` comes after all that time the stock one
        made: Any = PrivacyEngine().make_private(  # of three or four things, by mode
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4),
            criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(TensorDataset(x, y), batch_size=len(x)),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
        private, optimizer, *rest = made
        loss = rest[0] if mode == "ghost" else nn.CrossEntropyLoss()

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                value = loss(private(x), y)
            value.backward()
            optimizer.step()

        return step

    return make


def _out_of_place(self: Bottleneck, x: Tensor) -> Tensor:
    """The block's own forward without its in-place sum, which Opacus's hooks cannot follow."""
    out = self.relu(self.bn1(self.conv1(x)))
    out = self.relu(self.bn2(self.conv2(out)))
    out = self.bn3(self.conv3(out))
    return self.relu(out + (x if self.downsample is None else self.downsample(x)))


VARIANTS: Final = {"plain": plain, "rin": rin, "opacus hooks": opacus("hooks"), "opacus ghost": opacus("ghost")}


def _rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=32)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--half", action="store_true", help="bf16 autocast on all sides")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    fit.settle(CPU, 1)
    torch.use_deterministic_algorithms(False)  # Opacus has no deterministic kernels
    if args.memory_of:
        before = _rss_mb()
        step = VARIANTS[args.memory_of](args.patients, args.images, args.half)
        for _ in range(2):
            step()
        print(json.dumps(_rss_mb() - before))
        return
    memory = {name: _memory(name) for name in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    steps = {name: make(args.patients, args.images, args.half) for name, make in VARIANTS.items()}
    for _ in range(args.steps):
        for name, step in steps.items():
            began = time.process_time()
            step()
            seconds[name].append(time.process_time() - began)
    precision = "bf16" if args.half else "float32"
    print(f"{args.patients} patients of {args.images} images, {precision}, {args.steps} steps")
    for name in VARIANTS:
        cost, times = min(seconds[name]), min(seconds[name]) / min(seconds["plain"])
        share = memory[name] / memory["plain"]
        print(f"{name:13} {cost:7.2f} CPU-s {times:5.2f} | {memory[name]:6.0f} MB {share:5.2f}")


def _memory(name: str) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.private_step", *sys.argv[1:], "--memory-of", name]
    return float(
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    )


if __name__ == "__main__":
    main()
