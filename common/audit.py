"""What an audit of private training computes: a lower bound on epsilon, and tests of noise and sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.special import ndtr

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]

FRACTIONS: Final = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # shares of the canaries guessed in, and as many guessed out
LARGEST: Final = 60.0  # lower bounds are searched up to here
BISECTIONS: Final = 40
ALARM: Final = 1e-6  # how often a right mechanism fails one of the tests of distribution
Z: Final = float(stats.norm.isf(ALARM / 2))


@dataclass(frozen=True)
class Check:
    """One question of the audit and its answer; `value` above `threshold`, or no number, is a fault found.

    Attributes:
        name: short, stable, for JSON.
        value: what was measured.
        threshold: the largest value that a right mechanism may show.
        words: what value and threshold are, for a reader of the report.
    """

    name: str
    value: float
    threshold: float
    words: str

    @property
    def passed(self) -> bool:
        """Whether nothing was found; a pass proves nothing more than that."""
        return self.value <= self.threshold


def lower_bound(scores: Floats, included: Bools, delta: float, *, p: float = 0.05) -> float:
    """An epsilon that the mechanism exceeds with confidence 1 - p, from one run (Steinke, Nasr and Jagielski 2023).

    Each canary was in the data or not by its own fair coin. The highest scores are guessed in, the lowest out, the rest
    is not guessed; under (epsilon, delta) differential privacy so many right guesses as there were have at most a
    certain probability (arXiv 2305.08846, theorem 5.2). The best of six fractions counts, so each is held to p / 6:
    only then is p the probability that a right mechanism is accused, and it costs 0.2 to 0.6 of the bound.

    Args:
        scores: (m,) finite; higher where the run looks as if the canary was in.
        included: (m,) bool, the coins.
        delta: the delta of the claim.

    Returns:
        The bound, in [0, 60]; 0 where the guesses are no better than chance.

    Raises:
        ValueError: other shapes, or scores that are not finite.
    """
    if scores.ndim != 1 or scores.shape != included.shape or included.dtype != np.bool_:
        raise ValueError(f"one score and one coin a canary, got {scores.shape} and {included.shape} {included.dtype}")
    if not len(scores) or not np.isfinite(scores).all():
        raise ValueError("scores must be finite, and there must be some")
    ranked = included[np.argsort(scores, kind="stable")]
    best = 0.0
    for fraction in FRACTIONS:
        few = int(fraction * len(ranked))
        right = int((~ranked[:few]).sum() + ranked[len(ranked) - few :].sum())
        best = max(best, _largest(right, 2 * few, len(ranked) * delta, p / len(FRACTIONS)))
    return best


def ceiling(canaries: int, delta: float, *, p: float = 0.05) -> float:
    """The largest lower bound that so many canaries show with every guess right: a claim above it cannot be tested.

    Fair coins put more canaries in than out or the other way; an excess of three standard deviations is counted in.
    """
    coins = np.arange(canaries) >= canaries // 2 - int(1.5 * math.sqrt(canaries))
    return lower_bound(np.arange(canaries, dtype=np.float64), coins, delta, p=p)


def one_run(scores: Floats, included: Bools, claimed: float, delta: float) -> Check:
    """`lower_bound` against the epsilon that the accountant claims for the same run.

    Raises:
        ValueError: the canaries are too few for the claim: whatever the mechanism did, nothing could be found.
    """
    if (most := ceiling(len(scores), delta)) <= claimed:
        raise ValueError(
            f"{len(scores)} canaries can show {most:.2f} at most, a claim of {claimed:.2f} is not testable"
        )
    found = lower_bound(scores, included, delta)
    words = "epsilon that one run with canaries shows with 95 % confidence; at most the epsilon claimed"
    return Check("one-run", found, claimed, words)


def noise(sample: Floats, sigma: float) -> tuple[Check, Check]:
    """Whether (n,) values are draws of N(0, sigma**2): their spread by chi-squared, their shape by Kolmogorov-Smirnov.

    n is at least some thousands; at 24 million the spread is tested to 0.07 %.
    """
    sample = np.asarray(sample, np.float64) / sigma
    n = len(sample)
    low, high = (math.sqrt(value / n) for value in stats.chi2.ppf([ALARM / 2, 1 - ALARM / 2], n))
    spread = math.sqrt(float(sample @ sample) / n)
    below = ndtr(np.sort(sample))
    steps = np.arange(n + 1) / n
    distance = float(max((steps[1:] - below).max(), (below - steps[:-1]).max()))
    return (
        Check("noise-spread", abs(spread - 1), max(high - 1, 1 - low), "deviation of the noise's spread from sigma"),
        Check(
            "noise-shape",
            distance,
            float(stats.kstwobign.isf(ALARM)) / math.sqrt(n),
            "largest distance between the distributions of the noise and of a normal (Kolmogorov-Smirnov)",
        ),
    )


def independence(first: Floats, second: Floats) -> Check:
    """Whether two samples of noise, (n,) each, have nothing to do with each other: two steps, sites or processes."""
    first, second = (np.asarray(part, np.float64).ravel() for part in (first, second))
    scale = math.sqrt(float(first @ first) * float(second @ second))
    value = abs(float(first @ second)) / scale * math.sqrt(len(first)) if scale else math.inf
    return Check("noise-independence", value, Z, "correlation of two samples of noise, in standard errors")


def sampling(drawn: Bools, rate: float, images: npt.NDArray[np.integer]) -> tuple[Check, ...]:
    """Whether each patient was in each step by a coin of its own with probability `rate` (Poisson sampling).

    Args:
        drawn: (steps, patients), who was in which step; steps * patients * rate**2 is at least some hundreds.
        rate: in (0, 1).
        images: (patients,) how many images each has.

    Returns:
        Five checks in standard errors: how often patients were drawn, how that differs between them (always the same
        ones, or everyone once an epoch), how it goes with their number of images, how the batch size varies (fixed
        batches), and how often a patient is drawn again in the next step (drawing without replacement).

    Raises:
        ValueError: nothing to test, or a rate at which nothing is left to chance.
    """
    if not 0 < rate < 1 or min(drawn.shape) < 2 or images.shape != drawn.shape[1:]:
        raise ValueError(f"steps of some patients at a rate between 0 and 1, got {drawn.shape}, {images.shape}, {rate}")
    steps, patients = drawn.shape
    sizes, counts = drawn.sum(axis=1, dtype=np.int64), drawn.sum(axis=0, dtype=np.int64)
    spread = rate * (1 - rate)
    again = float((drawn[1:] & drawn[:-1]).sum())
    again_variance = (steps - 1) * (rate**2 - rate**4) + 2 * (steps - 2) * (rate**3 - rate**4)
    # Whole numbers, so that equal bags give exactly nothing.
    centred = images.astype(np.int64) * patients - images.sum(dtype=np.int64)
    along, along_variance = int(centred @ counts), float(centred @ centred) * steps * spread
    return (
        _z("sampling-rate", drawn.sum(), steps * patients * rate, steps * patients * spread, "draws in all"),
        _dispersion("sampling-patients", counts, steps, rate, "spread of the patients' numbers of draws"),
        _z("sampling-images", along, 0, along_variance, "draws against numbers of images"),
        _dispersion("sampling-batches", sizes, patients, rate, "spread of the numbers of patients in a step"),
        _z(
            "sampling-again",
            again,
            patients * (steps - 1) * rate**2,
            patients * again_variance,
            "draws in two steps running",
        ),
    )


def _z(name: str, value: float, mean: float, variance: float, words: str) -> Check:
    off = abs(float(value) - mean)
    if off:
        off = off / math.sqrt(variance) if variance else math.inf
    return Check(name, off, Z, f"{words}, in standard errors")


def _dispersion(name: str, counts: npt.NDArray[np.int64], trials: int, rate: float, words: str) -> Check:
    """Pearson's dispersion of counts that should be Binomial(trials, rate), with the binomial's kurtosis."""
    one = trials * rate * (1 - rate)
    total = float(((counts - trials * rate) ** 2).sum() / one)
    return _z(name, total, len(counts), len(counts) * (2 + (1 - 6 * rate * (1 - rate)) / one), words)


def _largest(right: int, guesses: int, lost: float, p: float) -> float:
    """The largest epsilon that `right` of `guesses` refute at level `p`; `lost` is canaries times delta."""
    if not guesses or _p_value(right, guesses, 0.0, lost) >= p:
        return 0.0
    low, high = 0.0, LARGEST
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _p_value(right, guesses, middle, lost) < p else (low, middle)
    return low


def _p_value(right: int, guesses: int, epsilon: float, lost: float) -> float:
    """At most this probable are so many right guesses under epsilon: theorem 5.2 for fair coins."""
    if not right:
        return 1.0
    chance = 1 / (1 + math.exp(-epsilon))
    beta = float(stats.binom.sf(right - 1, guesses, chance))
    below = stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, chance)
    alpha = float((np.cumsum(below) / np.arange(1, right + 1)).max())
    return min(1.0, beta + 2 * lost * alpha)
