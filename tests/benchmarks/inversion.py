"""Gradient inversion: the picture of a patient out of one update of the product's real steps, privacy off and on."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rin.common.backbones import Network, initial
from rin.common.batches import Order
from rin.common.fit import fit_round
from rin.common.labels import label_index
from rin.common.plan import Plan
from rin.common.private import Mechanism, fit_private
from rin.server.phantom import PHANTOM_LABELS
from tests.benchmarks.likeness import psnr, ssim
from tests.benchmarks.patients import QUIET, ROWS, Held, Pixels, phantom, plan_of, sigma_for

Pictures = npt.NDArray[np.float64]
log = logging.getLogger(__name__)

CPU: Final = torch.device("cpu")
SIDE: Final = 64
SITE: Final = "siteA"
LABELS: Final = ("CT_lung_Nodule", "MR_brain_intra", "US_usabd_kidney", "MR_brain_chronic_infarct")
FLOOR: Final = 20  # patients, as in a site's policy, and 8 steps of 8 images
# Of private training: 128 of 2,000 patients a step.
BUDGET: Final = 8.0
DELTA: Final = 1e-5
RATE: Final = 0.064
STEPS: Final = 300
ITERATIONS: Final = 300
PACE: Final = 0.03  # of the attacker's optimizer, in grey values
SMOOTH: Final = 1e-3  # weight of total variation
OPEN: Final = 1.5  # biases of all norms in the coordinator's weights: few rectifiers cut anything off then
LOUD: Final = 20.0  # how much larger the head's row of the picked label is than a random one
SURE: Final = 1000.0  # how far below all others its logit is, whatever the image
GUESSES: Final = 100  # other patients of a label; their mean is what somebody without any update would guess


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one attack made of the pictures.

    Attributes:
        name: of the attack.
        pictures: (n, SIDE, SIDE) in 0..1.
        psnr, ssim: of each, against the original.
        place: of the original, from 1, among `GUESSES` images of other patients of the label beside it, by how well
            each correlates with the picture.
    """

    name: str
    pictures: Pictures
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    place: tuple[int, ...]


def plan_off(steps: int, batch: int, rate: float) -> Plan:
    return plan_of(SIDE, augment=QUIET, local_steps=steps, batch_size=batch, learning_rate=rate)


def mechanism() -> Mechanism:
    """Of a plan at epsilon 8; here the one patient is surely drawn, and alone, which is best for the attacker."""
    sigma = sigma_for(BUDGET, rate=RATE, steps=STEPS, delta=DELTA)
    return Mechanism(rate=1.0, patients=128.0, images=1, views=1, clip=1.0, sigma=sigma)


def opened(network: Network) -> Network:
    """`network` with weights of a malicious coordinator: norms lift everything above zero, so all pixels pass."""
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.bias.fill_(OPEN)
    return network


def picking(network: Network, row: int) -> Network:
    """`opened`, and a head through which only images of the label `row` send a gradient back.

    All other rows are zero, and the label itself seems impossible: images of other labels have nothing to correct in
    it, those of the label all the more. After Wen et al. 2022 (arXiv 2202.00580).
    """
    opened(network)
    with torch.no_grad():
        kept = network.head.weight[row] * LOUD
        network.head.weight.zero_()
        network.head.bias.zero_()
        network.head.weight[row] = kept
        network.head.bias[row] = -SURE
    return network


def update_of(network: Network, data: Held, plan: Plan, private: Mechanism | None = None) -> list[Tensor]:
    """What leaves the site after one round from the weights of `network`, which stay as they are."""
    before = [p.detach().clone() for p in network.parameters()]
    network.train()
    if private is None:
        fit_round(network, data, plan, rows=ROWS, round=1, site=SITE, device=CPU, threads=1)
    else:
        fit_private(network, data, plan, private, rows=ROWS, round=1, device=CPU, threads=1)
    update = [p.detach() - old for p, old in zip(network.parameters(), before, strict=True)]
    with torch.no_grad():
        for parameter, old in zip(network.parameters(), before, strict=True):
            parameter.copy_(old)
    return update


def times(plan: Plan, images: int) -> Tensor:
    """(images,) how often each is in a round: the order of batches is a function of the plan, so everybody knows it."""
    order = Order(images, plan.training.batch_size, (plan.training.seed, SITE, 1))
    drawn = np.concatenate([order(step) for step in range(plan.training.local_steps)])
    return torch.from_numpy(np.bincount(drawn, minlength=images)).float()


def reconstruct(network: Network, update: Sequence[Tensor], rows: Sequence[int], weights: Tensor) -> Pictures:
    """Pictures (n, SIDE, SIDE) of labels `rows` whose gradient points where the update came from.

    Cosine distance and total variation by Adam on the signs of the gradient (Geiping et al. 2020, arXiv 2003.14053),
    over all parameters before the last stage. The attacker knows the labels, and by `weights` how often each image
    was trained on.
    """
    wanted = {name: -value for (name, _), value in zip(network.named_parameters(), update, strict=True)}
    chosen = {name: p for name, p in network.named_parameters() if "layer4" not in name and "head" not in name}
    goal, column = [wanted[name] for name in chosen], torch.tensor([ROWS.index(row) for row in rows])
    length = _length(goal)
    draw = torch.Generator().manual_seed(0)
    guess = (0.5 + 0.1 * torch.randn(len(rows), 1, SIDE, SIDE, generator=draw)).requires_grad_()
    optimizer = torch.optim.Adam([guess], lr=PACE)
    for step in range(ITERATIONS):
        optimizer.param_groups[0]["lr"] = PACE * 0.5 * (1 + math.cos(math.pi * step / ITERATIONS))
        losses = F.cross_entropy(network(guess)[:, ROWS], column, reduction="none")
        found = torch.autograd.grad(losses @ weights, list(chosen.values()), create_graph=True)
        inner = torch.stack([(a * b).sum() for a, b in zip(found, goal, strict=True)]).sum()
        rough = guess.diff(dim=2).abs().mean() + guess.diff(dim=3).abs().mean()
        (slope,) = torch.autograd.grad(1 - inner / (length * _length(found)) + SMOOTH * rough, guess)
        guess.grad = slope.sign()
        optimizer.step()
        with torch.no_grad():
            guess.clamp_(0, 1)
    return guess.detach()[:, 0].double().numpy()


def _length(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.square().sum() for value in values]).sum().sqrt()


def patients(images: Sequence[Pixels] = ()) -> Held:
    """`FLOOR` patients of an image each: first one of each of `LABELS`, then others of other labels.

    Args:
        images: uint8 (SIDE, SIDE) in place of the first phantoms.
    """
    rest = [label for label in PHANTOM_LABELS if label not in LABELS]
    names = [*LABELS, *(rest[i % len(rest)] for i in range(FLOOR - len(LABELS)))]
    drawn = [phantom(name, (5, i), SIDE) for i, name in enumerate(names)]
    drawn[: len(images)] = images
    return Held(np.stack(drawn), np.array([label_index()[name] for name in names]), np.arange(FLOOR))


def attempts(held: Held) -> list[Attempt]:
    """All attacks on the first patients of `held`, one of each of `LABELS`."""
    return [_tried(name, attack(held), held) for name, attack in ATTACKS.items()]


def _tried(name: str, pictures: Pictures, held: Held) -> Attempt:
    true = held.pixels[: len(LABELS)] / 255
    pairs = list(zip(pictures, true, strict=True))
    log.info("%s: %.1f dB", name, np.mean([psnr(*pair) for pair in pairs]))
    places = [place(*pair, others(label)) for pair, label in zip(pairs, LABELS, strict=True)]
    alike = tuple(psnr(*pair) for pair in pairs), tuple(ssim(*pair) for pair in pairs)
    return Attempt(name, pictures, *alike, tuple(places))


def place(picture: Pictures, true: Pictures, others: Pictures) -> int:
    """Place of `true` (h, w), from 1, among it and `others` (n, h, w), by correlation with `picture`."""
    found = [np.corrcoef(picture.ravel(), each.ravel())[0, 1] for each in others]
    return 1 + int((np.array(found) >= np.corrcoef(picture.ravel(), true.ravel())[0, 1]).sum())


def others(label: str) -> Pictures:
    """(GUESSES, SIDE, SIDE) images of other patients of `label`."""
    return np.stack([phantom(label, (6, i), SIDE) for i in range(GUESSES)]) / 255


def guesses(held: Held) -> Pictures:
    """What the labels alone tell: the mean of other patients of each."""
    return np.stack([others(label).mean(0) for label in LABELS])


def alone(held: Held) -> Pictures:
    """Privacy off, no floors: each patient alone in one step."""
    return _each(held, opened(_network()), plan_off(1, 1, 1e-3))


def curious(held: Held) -> Pictures:
    """The same with random weights: the coordinator looks at updates and sends nothing made for it."""
    return _each(held, _network(), plan_off(1, 1, 1e-3))


def among(held: Held) -> Pictures:
    """Privacy off, floors kept: all of `held` in eight steps of eight images, all reconstructed together."""
    network, plan = opened(_network()), plan_off(8, 8, 1e-4)
    update = update_of(network, held, plan)
    return reconstruct(network, update, held.rows.tolist(), times(plan, len(held)))[: len(LABELS)]


def picked(held: Held) -> Pictures:
    """Privacy off, floors kept, and a head that picks the one patient of a label."""
    plan, found = plan_off(8, 8, 3e-5), []
    for row in held.rows[: len(LABELS)].tolist():
        network = picking(_network(), row)
        found.append(reconstruct(network, update_of(network, held, plan), [row], torch.ones(1)))
    return np.concatenate(found)


def private(held: Held) -> Pictures:
    """Privacy on: each patient alone in one step."""
    return _each(held, opened(_network()), plan_off(1, 1, 1e-3), mechanism())


def _each(held: Held, network: Network, plan: Plan, mechanism: Mechanism | None = None) -> Pictures:
    found = []
    for i, row in enumerate(held.rows[: len(LABELS)].tolist()):
        update = update_of(network, held.only(held.patient == i), plan, mechanism)
        found.append(reconstruct(network, update, [row], torch.ones(1)))
    return np.concatenate(found)


def _network() -> Network:
    return initial(plan_off(1, 1, 1.0).model, 0)


ATTACKS: Final[dict[str, Callable[[Held], Pictures]]] = {
    "guess": guesses,
    "curious": curious,
    "alone": alone,
    "among": among,
    "picked": picked,
    "private": private,
}
