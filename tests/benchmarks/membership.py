"""Membership inference: was this patient in the training? By likelihood ratios, against the product's real loops."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rin.common.accountant import Row, epsilon
from rin.common.backbones import BACKBONES, Network, initial
from rin.common.fit import fit_round
from rin.common.labels import label_index
from rin.common.plan import Plan
from rin.common.private import Mechanism, fit_private
from tests.benchmarks.patients import QUIET, Held, phantom, plan_of, sigma_for
from tests.learning.setup import shallow

Floats = npt.NDArray[np.float64]
Coins = npt.NDArray[np.bool_]
log = logging.getLogger(__name__)

CPU: Final = torch.device("cpu")
SIDE: Final = 32
NETWORK: Final = shallow((16, 32, 32), SIDE)
LABELS: Final = ("CT_lung_normal", "MR_brain_normal", "US_usabd_liver")
HEAD: Final = sorted(label_index()[label] for label in LABELS)
PATIENTS: Final = 100  # each in a training by a coin of its own
IMAGES: Final = 2  # of a patient
WRONG: Final = 1 / 3  # share of patients with a label drawn by chance, which a network can only learn by heart
MODELS: Final = 24  # each is attacked once, the others are its shadows
ROUNDS: Final = 10
RATE: Final = 0.2  # of private training
DELTA: Final = 1e-3
PRIVATE_STEPS: Final = 6  # a round
FPR: Final = 0.01
DRAWS: Final = 2000  # of the bootstrap


@dataclass(frozen=True, slots=True)
class Watched:
    """What the attacker sees of a set of trainings.

    Attributes:
        name: of the set.
        confidence: (models, rounds, patients), see `confidence`, after every round.
        inside: (models, patients), who was in each training: what the attacker wants to know.
        wrong: (patients,), whose label is not the true one.
        right: accuracy by the true labels on patients that were not in the training, mean over the models.
    """

    name: str
    confidence: Floats
    inside: Coins
    wrong: Coins
    right: float


@dataclass(frozen=True, slots=True)
class Found:
    """How well an attack tells patients inside from those outside, over all models; the intervals are of 95 %."""

    auc: float
    auc_interval: tuple[float, float]
    tpr: float  # share of those inside that are found when one in a hundred outside is taken for one
    tpr_interval: tuple[float, float]
    curve: tuple[Floats, Floats]  # false and true positive rates, ascending


def pool(seed: int) -> tuple[Held, npt.NDArray[np.int64]]:
    """All patients, and the row of each image's true label."""
    rng = np.random.default_rng(seed)
    names = [LABELS[number % len(LABELS)] for number in range(PATIENTS)]
    pixels = np.stack([phantom(name, (seed, i, j), SIDE) for i, name in enumerate(names) for j in range(IMAGES)])
    true = np.array([label_index()[name] for name in names])
    told = np.where(rng.random(PATIENTS) < WRONG, rng.choice(HEAD, PATIENTS), true)
    return Held(pixels, told.repeat(IMAGES), np.arange(PATIENTS).repeat(IMAGES)), true.repeat(IMAGES)


def coins(number: int) -> Coins:
    """Who is in training `number`."""
    return np.random.default_rng([11, number]).random(PATIENTS) < 0.5


@torch.inference_mode()
def confidence(network: Network, held: Held) -> Floats:
    """(patients,) how sure the network is of each patient's label: log p/(1 - p), the mean over the images."""
    logits = network.eval()(torch.from_numpy(held.pixels))[:, HEAD].double()
    column = torch.from_numpy(np.searchsorted(HEAD, held.rows))[:, None]
    own = logits.gather(1, column)[:, 0]
    others = logits.scatter(1, column, -torch.inf).logsumexp(1)
    return (own - others).numpy().reshape(-1, IMAGES).mean(1)


def plan_off() -> Plan:
    """Training without privacy, by the floors that a site's policy has: eight steps or more, of eight images."""
    return plan_of(SIDE, augment=QUIET, rounds=ROUNDS, local_steps=60, batch_size=8, learning_rate=0.05, momentum=0.9)


def plan_on() -> Plan:
    return plan_of(SIDE, augment=QUIET, rounds=ROUNDS, local_steps=PRIVATE_STEPS, batch_size=8, learning_rate=0.2)


def mechanism(budget: float) -> Mechanism:
    """Of a site that declares half of `PATIENTS`, so that all rounds together cost `budget` at `DELTA`."""
    sigma = sigma_for(budget, rate=RATE, steps=ROUNDS * PRIVATE_STEPS, delta=DELTA)
    return Mechanism(rate=RATE, patients=RATE * PATIENTS / 2, images=IMAGES, views=1, clip=1.0, sigma=sigma)


def watch(name: str, held: Held, true: npt.NDArray[np.int64], budget: float | None, models: int = MODELS) -> Watched:
    """Train `models` times; without `budget` not privately."""
    plan = plan_off() if budget is None else plan_on()
    private = None if budget is None else mechanism(budget)
    inside = np.stack([coins(number) for number in range(models)])
    seen, right = np.empty((models, ROUNDS, PATIENTS)), []
    for number in range(models):
        data, network = held.only(inside[number]), initial(plan.model, number)
        for round in range(1, ROUNDS + 1):
            network.train()
            if private is None:
                fit_round(network, data, plan, rows=HEAD, round=round, site=f"model{number}", device=CPU, threads=1)
            else:
                fit_private(network, data, plan, private, rows=HEAD, round=round, device=CPU, threads=1)
            seen[number, round - 1] = confidence(network, held)
        right.append(accuracy(network, held, true, ~inside[number]))
        log.info("%s: model %d of %d", name, number + 1, models)
    return Watched(name, seen, inside, (held.rows != true)[::IMAGES], float(np.mean(right)))


@torch.inference_mode()
def accuracy(network: Network, held: Held, true: npt.NDArray[np.int64], patients: Coins) -> float:
    """Share of the images of `patients` that the network calls by their true label."""
    best = network.eval()(torch.from_numpy(held.pixels))[:, HEAD].argmax(1).numpy()
    return float((np.array(HEAD)[best] == true)[patients[held.patient]].mean())


def likelihood_ratios(scores: Floats, inside: Coins) -> Floats:
    """(models, patients) log likelihood ratio of inside to outside: LiRA of Carlini et al. 2022 (arXiv 2112.03570).

    For each patient, normal distributions of the score over the other models with and without that patient. Variances
    are shared by all patients, as the paper advises for few shadow models.

    Args:
        scores: (models, patients), higher inside.
        inside: (models, patients).

    Raises:
        ValueError: a patient is in all of the other models, or in none.
    """
    found = np.empty_like(scores)
    for model in range(len(scores)):
        others = np.arange(len(scores)) != model
        fitted = [_normals(scores[others], chosen) for chosen in (inside[others], ~inside[others])]
        (mean_in, var_in), (mean_out, var_out) = fitted
        found[model] = (scores[model] - mean_out) ** 2 / (2 * var_out) - (scores[model] - mean_in) ** 2 / (2 * var_in)
        found[model] += 0.5 * math.log(var_out / var_in)
    return found


def _normals(scores: Floats, chosen: Coins) -> tuple[Floats, float]:
    """Mean of each patient's chosen scores, and the variance around those means over all patients."""
    counts = chosen.sum(0)
    if not counts.all():
        raise ValueError("a patient has no shadow model of one kind: train more models")
    means = np.where(chosen, scores, 0).sum(0) / counts
    return means, float(np.where(chosen, (scores - means) ** 2, 0).sum() / max(1, chosen.sum() - len(means)))


def rates(scores: Floats, inside: Coins) -> tuple[Floats, Floats]:
    """False and true positive rates of every threshold, from (0, 0) to (1, 1); equal scores share a point."""
    order = np.argsort(-scores.ravel(), kind="stable")
    ranked, hit = scores.ravel()[order], inside.ravel()[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    true, false = np.cumsum(hit)[last] / max(1, hit.sum()), np.cumsum(~hit)[last] / max(1, (~hit).sum())
    return np.append(0.0, false), np.append(0.0, true)


def area(curve: tuple[Floats, Floats]) -> float:
    return float(np.trapezoid(curve[1], curve[0]))


def at(curve: tuple[Floats, Floats], false: float = FPR) -> float:
    """The largest true positive rate whose false positive rate is at most `false`."""
    return float(curve[1][curve[0] <= false].max())


def measured(scores: Floats, inside: Coins) -> Found:
    """AUC and true positive rate, with intervals by drawing whole models and whole patients anew.

    The scores of a patient in all models lean on the same shadows, so models alone would give too narrow intervals.
    With no signal at all 98 of 100 of these hold an AUC of 0.5.
    """
    curve, rng = rates(scores, inside), np.random.default_rng(0)
    models, patients = scores.shape
    drawn = []
    for _ in range(DRAWS):
        chosen = np.ix_(rng.integers(models, size=models), rng.integers(patients, size=patients))
        again = rates(scores[chosen], inside[chosen])
        drawn.append((area(again), at(again)))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return Found(area(curve), (low[0], high[0]), at(curve), (low[1], high[1]), curve)


def found_by_label(seen: Watched) -> tuple[float, float]:
    """True positive rates of LiRA on the last weights among patients of wrong and of right labels, at one threshold."""
    ratios = likelihood_ratios(seen.confidence[:, -1], seen.inside)
    above = ratios > np.quantile(ratios[~seen.inside], 1 - FPR)
    wrong, right = (float(above[:, who][seen.inside[:, who]].mean()) for who in (seen.wrong, ~seen.wrong))
    return wrong, right


def allowed(false: Floats, budget: float, delta: float) -> Floats:
    """The most true positives that (epsilon, delta) allows at each false positive rate (Kairouz et al. 2015)."""
    return np.clip(np.minimum(math.exp(budget) * false + delta, 1 - math.exp(-budget) * (1 - delta - false)), 0, 1)


def accounted(false: Floats, budget: float) -> Floats:
    """The same by all pairs of epsilon and delta that the accountant gives for the mechanism: a lower curve."""
    row = Row(mechanism(budget).sigma, RATE, ROUNDS * PRIVATE_STEPS)
    deltas = np.append(np.logspace(-6, -1, 16), np.linspace(0.15, 0.9, 16))
    return np.min([allowed(false, epsilon([row], delta), delta) for delta in deltas.tolist()], axis=0)


def watched(budgets: tuple[float, ...], models: int = MODELS) -> list[Watched]:
    """Trainings without privacy, and with each of `budgets`."""
    logging.getLogger("rin.common.accountant").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "resnet18", NETWORK)
        held, true = pool(7)
        off = watch("privacy off", held, true, None, models)
        return [off, *(watch(f"epsilon {budget:g}", held, true, budget, models) for budget in budgets)]


def attacks(seen: Watched) -> dict[str, Found]:
    """The attacks by name: a plain threshold, LiRA on the last weights, LiRA on the weights of every round."""
    last = seen.confidence[:, -1]
    every = np.mean([likelihood_ratios(seen.confidence[:, r], seen.inside) for r in range(ROUNDS)], axis=0)
    return {
        "threshold": measured(last, seen.inside),
        "last weights": measured(likelihood_ratios(last, seen.inside), seen.inside),
        "every round": measured(every, seen.inside),
    }
