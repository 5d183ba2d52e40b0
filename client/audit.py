"""`rin-client audit`: does the installed release do what its privacy statement says? On made-up patients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rin.common import audit, fit
from rin.common.accountant import Row, bound, epsilon
from rin.common.audit import Check
from rin.common.backbones import initial
from rin.common.noise import Source
from rin.common.plan import Model
from rin.common.private import Mechanism, PatientGradients, Sampler, side_by_side, side_by_side_fits

CPU: Final = torch.device("cpu")
DELTA: Final = 1e-5
CANARIES: Final = 2000  # they can show 5.4 at most, so every claim below is testable
CLAIMS: Final = (Row(1.11, 1.0, 1), Row(4.44, 1.0, 16), Row(1.4, 0.25, 12))  # each of about epsilon 4 or less
NOISE: Final = 4_000_000
SLACK: Final = 1e-5  # relative, of the clip: rounding
OTHERS: Final = 60  # patients beside the one who comes and goes
CLIP: Final = 0.7

Bags = Callable[[Tensor], Iterable[Tensor]]


class Vector(nn.Module):
    """A coordinate a canary; the gradient of its output is its input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight


def checks(progress: Callable[[Check], None] = lambda check: None) -> list[Check]:
    """Every check through the real step, half a minute on a CPU; a right release fails one in some thousand audits."""
    found = []
    for part in (sensitivity, noise, sampling, accountants, one_runs):
        for check in part():
            progress(check)
            found.append(check)
    return found


def sensitivity() -> list[Check]:
    """The norm by which a step's sum changes with a patient: in one layer, and in a network as it is trained here."""
    layer, one = nn.Linear(16, 8), torch.rand(1, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        nn.init.ones_(layer.weight)
    hostile = [one.repeat(1000, 1), one * 1e18, one * 1e30, one * math.inf, one * math.nan, one * 0, one]
    rest = list(torch.rand(OTHERS, 2, 16, generator=torch.Generator().manual_seed(1)))
    words = "how far one patient, however made, moves the sum of a step; at most the clip"
    worst = max(
        _moved(layer, bag, others, together=together)
        for others, together in itertools.product((rest[:0], rest), (False, True))
        for bag in hostile
    )
    fit.settle(CPU, 1)
    network = initial(Model.model_validate({"backbone": "resnet18", "norm": "group", "image-size": 32}), 0)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = list(torch.rand(8, 1, 1, 32, 32, generator=torch.Generator().manual_seed(2)))
    half = fit.half_precision(CPU)
    together = side_by_side_fits(network, CPU, half=half)
    moved = max(_moved(network, images[0], images[1:n], together=together, half=half) for n in range(1, 9))
    told = "the same of a network as it is trained on this processor, beside none to seven others"
    return [
        Check("sensitivity", worst, CLIP * (1 + SLACK), words),
        Check("sensitivity of a network", moved, CLIP * (1 + SLACK), told),
    ]


def _moved(module: nn.Module, bag: Tensor, others: Sequence[Tensor], *, together: bool, half: bool = False) -> float:
    """How far the sum of a step without noise goes when the patient `bag` comes to `others`."""
    sums = []
    for patients in (others, [bag, *others]):
        mechanism = Mechanism(rate=1.0, patients=1.0, images=1, views=1, clip=CLIP, sigma=0.0)
        gradients = PatientGradients(module, _mean, mechanism, Source(), device=CPU, half=half, together=together)
        for few in side_by_side((one, one) for one in patients):
            gradients.add(*few)
        gradients.settle()
        sums.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).double())
    return (sums[1] - sums[0]).norm().item()


def noise() -> list[Check]:
    """What a step without any patient releases, twice."""
    module, sigma = Vector(NOISE), 1.3
    mechanism = Mechanism(rate=1.0, patients=1.0, images=1, views=1, clip=1.0, sigma=sigma)
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)  # a seed must not repeat it
        PatientGradients(module, _mean, mechanism, Source(), device=CPU).settle()
        assert module.weight.grad is not None
        drawn.append(module.weight.grad.numpy().copy())
    return [*audit.noise(drawn[0], sigma), audit.independence(drawn[0], drawn[1])]


def sampling() -> list[Check]:
    """Who is in which step, of patients with very different numbers of images."""
    images, steps, rate = np.tile([1, 10, 3, 1, 50], 40), 2000, 0.1
    patient = np.repeat(np.arange(len(images)), images)
    sampler = Sampler(patient, Mechanism(rate, 1.0, 4, 1, 1.0, 1.0), Source())
    drawn = np.zeros((steps, len(images)), bool)
    for row in drawn:
        row[[patient[one[0]] for one in sampler.step()]] = True
    return list(audit.sampling(drawn, rate, images))


def accountants() -> list[Check]:
    """The reported epsilon never lies above the other accountant's bound."""
    words = "epsilon of the numerical accountant over the Renyi accountant's bound"
    rows = [*CLAIMS, Row(0.8, 0.02, 1000)]
    return [Check("accountants", max(epsilon([row], DELTA) / bound([row], DELTA) for row in rows), 1.0, words)]


def one_runs() -> list[Check]:
    """What one run with canaries shows, against the claim; see `rin.common.audit.lower_bound`."""
    return [
        audit.one_run(*released(row.sigma, row.steps, rate=row.rate), epsilon([row], DELTA), DELTA) for row in CLAIMS
    ]


def released(
    sigma: float,
    steps: int,
    *,
    rate: float = 1.0,
    images: int = 1,
    source: Source | None = None,
    bags: Bags = lambda bag: (bag,),
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """A score a canary from what `steps` private steps release, and who was in the data.

    A canary is a patient with a coordinate of its own and a gradient far above the clip, in the data by a fair coin.
    Its score is the sum of what is released of that coordinate.

    Args:
        bags: how the images of a patient reach the clip: as they are, or, to see that the audit finds it, in parts.
    """
    source = source or Source()
    included = source.uniforms(CANARIES) < 0.5
    members = np.flatnonzero(included)
    module = Vector(CANARIES)
    mechanism = Mechanism(rate=rate, patients=1.0, images=images, views=1, clip=1.0, sigma=sigma)
    gradients = PatientGradients(module, _mean, mechanism, source, device=CPU)
    sampler, scores = Sampler(np.repeat(np.arange(len(members)), images), mechanism, source), np.zeros(CANARIES)
    for _ in range(steps):
        for drawn in sampler.step():
            bag = torch.zeros(len(drawn), CANARIES)
            bag[:, members[drawn[0] // images]] = 100.0
            for part in bags(bag):
                gradients.add((part, part))
        gradients.settle()
        assert module.weight.grad is not None
        scores += module.weight.grad.numpy()
    return scores, included


def _mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.mean()
