"""The audit's maths: a right mechanism is not accused, and each planted fault is found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypedDict

import numpy as np
import pytest

from rin.common.audit import Bools, Check, Floats, ceiling, independence, lower_bound, noise, one_run, sampling

DELTA = 1e-5
CANARIES = 2000
CLAIMED = 4.39  # by the accountant, for sigma 1 in one step and for sigma 4 in sixteen, all patients in each


def run(
    seed: int, *, sigma: float, steps: int, rate: float = 1.0, images: int = 1, noisy: bool = True
) -> tuple[Floats, Bools]:
    """Sums of the Gaussian mechanism: each canary has a coordinate of its own and adds one clip norm for each image."""
    draws = np.random.default_rng(seed)
    coins = draws.random(CANARIES) < 0.5
    released = np.zeros(CANARIES)
    for _ in range(steps):
        released += images * (coins & (draws.random(CANARIES) < rate))
        released += noisy * sigma * draws.standard_normal(CANARIES)
    return released, coins


class Fault(TypedDict, total=False):
    images: int
    noisy: bool


def failing(checks: tuple[Check, ...]) -> set[str]:
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (4.0, 16)])
@pytest.mark.parametrize("seed", range(5))
def test_a_right_mechanism_stays_below_its_claim(sigma: float, steps: int, seed: int) -> None:
    check = one_run(*run(seed, sigma=sigma, steps=steps), CLAIMED, DELTA)
    assert check.passed
    assert 1.0 < check.value < 3.0  # a bound of nothing would pass as well


def test_a_right_mechanism_with_sampling_stays_below_its_claim() -> None:
    assert 0.5 < lower_bound(*run(0, sigma=0.8, steps=100, rate=0.1), DELTA) < 4.0  # claimed: 10.99


@pytest.mark.parametrize(
    "fault", [{"images": 10}, {"noisy": False}, {"images": 4}], ids=["clip per image", "no noise", "four images"]
)
@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (4.0, 16)])
def test_a_planted_fault_exceeds_the_claim(fault: Fault, sigma: float, steps: int) -> None:
    check = one_run(*run(1, sigma=sigma, steps=steps, **fault), CLAIMED, DELTA)
    assert not check.passed
    assert check.value > CLAIMED


def test_the_figures_of_the_method_without_its_correction() -> None:
    # Six thresholds at 0.3 / 6 are each of them at 0.05, uncorrected.
    assert lower_bound(*run(1, sigma=1, steps=1, noisy=False), DELTA, p=0.3) == pytest.approx(5.94, abs=0.01)
    bounds = [lower_bound(*run(seed, sigma=1, steps=1), DELTA, p=0.3) for seed in range(10)]
    assert min(bounds) < 2.18 < max(bounds)


@pytest.mark.parametrize("truth", [0.5, 1.0, 2.0, 4.0])
def test_randomised_response_is_measured_and_not_accused(truth: float) -> None:
    draws = np.random.default_rng(7)
    bounds = []
    for _ in range(20):
        coins = draws.random(CANARIES) < 0.5
        honest = draws.random(CANARIES) < 1 / (1 + math.exp(-truth))
        bounds.append(lower_bound((coins == honest) + draws.random(CANARIES) / 2, coins, 0.0))
    assert sum(bound > truth for bound in bounds) <= 5  # one in twenty, and what chance adds to it
    assert np.median(bounds) > 0.6 * truth


def test_guessing_shows_nothing() -> None:
    draws = np.random.default_rng(3)
    coins = draws.random(CANARIES) < 0.5
    assert lower_bound(draws.random(CANARIES), coins, DELTA) < 0.3
    assert lower_bound(-coins.astype(float), coins, DELTA) == 0.0


def test_a_larger_delta_and_fewer_canaries_show_less() -> None:
    scores, coins = run(0, sigma=1, steps=1)
    assert lower_bound(scores, coins, 1e-4) < lower_bound(scores, coins, 1e-6)
    assert ceiling(200, DELTA) < ceiling(2000, DELTA) < 6
    assert lower_bound(scores[:3], coins[:3], DELTA) == 0.0


def test_what_cannot_be_tested_is_said() -> None:
    with pytest.raises(ValueError, match="not testable"):
        one_run(*run(0, sigma=1, steps=1), 10.99, DELTA)


@pytest.mark.parametrize(
    ("scores", "coins"),
    [
        (np.zeros(3), np.zeros(4, bool)),
        (np.zeros(3), np.zeros(3, int)),
        (np.array([1.0, np.nan]), np.zeros(2, bool)),
        (np.zeros(0), np.zeros(0, bool)),
        (np.zeros((2, 2)), np.zeros((2, 2), bool)),
    ],
)
def test_scores_that_are_none_are_refused(scores: Floats, coins: Bools) -> None:
    with pytest.raises(ValueError, match=r"scores|score"):
        lower_bound(scores, coins, DELTA)


def test_normal_noise_passes() -> None:
    draws = np.random.default_rng(0)
    checks = noise(draws.normal(0, 3.5, 1_000_000).astype(np.float32), 3.5)
    assert failing(checks) == set()
    assert checks[0].threshold < 0.005
    assert all(0 < check.value < check.threshold for check in checks)


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        (lambda draws, n: 0.99 * draws.standard_normal(n), {"noise-spread"}),
        (lambda draws, n: np.zeros(n), {"noise-spread", "noise-shape"}),
        (lambda draws, n: draws.laplace(0, math.sqrt(0.5), n), {"noise-shape"}),
        (lambda draws, n: draws.standard_normal(n) + 0.01, {"noise-shape"}),
        (
            lambda draws, n: np.where(np.arange(n) == 5, np.nan, draws.standard_normal(n)),
            {"noise-spread", "noise-shape"},
        ),
    ],
    ids=["too little", "none", "Laplace", "shifted", "not a number"],
)
def test_other_noise_is_found(fault: Callable[[np.random.Generator, int], Floats], names: set[str]) -> None:
    assert failing(noise(fault(np.random.default_rng(0), 1_000_000), 1.0)) >= names


def test_noise_of_a_shared_seed_is_found() -> None:
    first, second = (np.random.default_rng(seed).standard_normal(100_000) for seed in (1, 2))
    assert independence(first, second).passed
    assert not independence(first, np.random.default_rng(1).standard_normal(100_000)).passed
    assert not independence(first, 0.1 * first + second).passed
    assert not independence(first, -2 * first).passed
    assert not independence(np.zeros(10), np.zeros(10)).passed


STEPS, PATIENTS, RATE = 1000, 500, 0.1
BAG = np.arange(PATIENTS) % 10 + 1


def poisson(seed: int, rates: Floats | float = RATE) -> Bools:
    return np.random.default_rng(seed).random((STEPS, PATIENTS)) < rates


def epochs() -> Bools:
    """Ten shuffled batches an epoch, what a data loader does."""
    draws, drawn = np.random.default_rng(0), np.zeros((STEPS, PATIENTS), bool)
    for step in range(0, STEPS, 10):
        for place, batch in enumerate(np.split(draws.permutation(PATIENTS), 10)):
            drawn[step + place, batch] = True
    return drawn


def fixed() -> Bools:
    """Batches of a fixed size, drawn afresh each step."""
    ranks = np.random.default_rng(0).random((STEPS, PATIENTS)).argsort(axis=1)
    return ranks < int(RATE * PATIENTS)


@pytest.mark.parametrize("seed", range(3))
def test_poisson_sampling_passes(seed: int) -> None:
    checks = sampling(poisson(seed), RATE, BAG)
    assert failing(checks) == set()
    assert len({check.name for check in checks}) == 5


@pytest.mark.parametrize(
    ("drawn", "names"),
    [
        (poisson(0, RATE * 1.05), {"sampling-rate"}),
        (poisson(0, np.where(np.arange(PATIENTS) == 7, 0.9, RATE)), {"sampling-patients"}),
        (poisson(0, RATE * BAG / BAG.mean()), {"sampling-images", "sampling-patients"}),
        (np.repeat(poisson(0)[::50], 50, axis=0), {"sampling-patients", "sampling-again"}),
        (np.repeat(poisson(0)[:, ::10], 10, axis=1), {"sampling-batches"}),
        (fixed(), {"sampling-batches"}),
        (epochs(), {"sampling-batches", "sampling-patients", "sampling-again"}),
    ],
    ids=["rate", "favourite", "by images", "same step", "in groups", "fixed size", "epochs"],
)
def test_other_sampling_is_found(drawn: Bools, names: set[str]) -> None:
    assert failing(sampling(drawn, RATE, BAG)) >= names


def test_bags_of_one_size_say_nothing_about_sizes() -> None:
    assert failing(sampling(poisson(1), RATE, np.full(PATIENTS, 3))) == set()


@pytest.mark.parametrize("rate", [0.0, 1.0, math.nan])
def test_sampling_that_leaves_nothing_to_chance_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        sampling(poisson(0), rate, BAG)
