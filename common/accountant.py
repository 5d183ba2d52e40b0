"""How much privacy a history of private steps has cost: epsilon at a delta, for one patient added or removed."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from opacus.accountants.analysis import prv
from opacus.accountants.analysis.rdp import compute_rdp

_log = logging.getLogger(__name__)

SMALLEST_SIGMA: Final = 0.3  # below, the numerical accountant takes minutes and then does not return
ERROR: Final = 0.01  # how far above the truth the reported epsilon may lie, absolute
COARSEST: Final = 0.1  # the same, where a history is so long or so dear that the mesh must be coarser
POINTS: Final = 1 << 23  # mesh points of one composition, all rows together: 64 MiB each time they are held
HANDFUL: Final = 8  # rows that are composed as they are; more are rounded to a grid first
GRID: Final = 9  # bits of that grid: 0.2 to 0.4 % from point to point, epsilon grows by 0.4 % on average, 1.4 % at most
MOST: Final = 1_000_000  # where counting rounds ends
# Opacus's orders, and larger ones: without them the bound saturates where the noise is strong.
ORDERS: Final = (*(1 + x / 10 for x in range(1, 100)), *range(11, 65), 80, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True)
class Row:
    """`steps` equal steps of DP-SGD with Poisson sampling (the sampled Gaussian mechanism).

    Args:
        sigma: standard deviation of the noise in units of the clip norm, at least 0.3.
        rate: probability with which each patient is in a step, in (0, 1].
        steps: how many such steps, at least 1; a step whose sample was empty counts.

    Raises:
        ValueError: a figure is outside its range.
    """

    sigma: float
    rate: float
    steps: int

    def __post_init__(self) -> None:
        if not SMALLEST_SIGMA <= self.sigma < math.inf:
            raise ValueError(f"sigma must be a number of at least {SMALLEST_SIGMA}, got {self.sigma}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"the sampling rate must lie above 0 and be at most 1, got {self.rate}")
        if self.steps != int(self.steps) or self.steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {self.steps}")


def epsilon(rows: Sequence[Row], delta: float) -> float:
    """What the rows have cost together: an upper bound, at most about 0.01 above the truth; 0.0 for no rows.

    Numerical composition of privacy random variables (Gopi, Lee and Wutschitz 2021, arXiv 2106.02848) by Opacus, or the
    bound below where that one is smaller or where numbers fail the composition. Neighbouring archives differ by one
    patient, added or removed; the order of the rows does not matter.

    Args:
        rows: the whole history of a population of patients.
        delta: in (0, 1); the site's, at most 1 over the number of its patients.

    Raises:
        ValueError: delta is outside its range.
    """
    bounded = bound(rows, delta)
    return min(bounded, _composed(merged(rows), delta, bounded)) if rows else 0.0


def bound(rows: Sequence[Row], delta: float) -> float:
    """The fast bound on the same epsilon, 5 to 16 % looser: it opens the gate, `epsilon` decides where it does not.

    Renyi differential privacy of the sampled Gaussian mechanism (Mironov, Talwar and Zhang 2019, arXiv 1908.10530),
    added up over the rows and turned into epsilon by theorem 21 of Balle et al. 2020 (arXiv 1905.09982).

    Raises:
        ValueError: delta is outside its range.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, got {delta}")
    if not rows:
        return 0.0
    spent = np.sum([row.steps * _renyi(row.sigma, row.rate) for row in joined(rows)], axis=0)
    orders = np.asarray(ORDERS)
    spent += np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return max(0.0, float(np.min(np.where(np.isnan(spent), np.inf, spent))))


def joined(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The same history with one row for each (sigma, rate), in their order."""
    steps: Counter[tuple[float, float]] = Counter()
    for row in rows:
        steps[row.sigma, row.rate] += row.steps
    return tuple(Row(sigma, rate, count) for (sigma, rate), count in sorted(steps.items()))


def merged(rows: Iterable[Row]) -> tuple[Row, ...]:
    """`joined`, and where more than a handful of rows remain they are rounded to a grid so that like joins like.

    Sigma is rounded down and the rate up, so the result costs at least as much as the rows.
    """
    exact = joined(rows)
    if len(exact) <= HANDFUL:
        return exact
    return joined(Row(max(SMALLEST_SIGMA, -_up(-row.sigma)), min(1.0, _up(row.rate)), row.steps) for row in exact)


def fits(history: Sequence[Row], row: Row, ceiling: float, delta: float) -> bool:
    """Whether the history and `row` together stay at or under `ceiling`."""
    rows = (*history, row)
    return bound(rows, delta) <= ceiling or epsilon(rows, delta) <= ceiling


def most_rounds(history: Sequence[Row], row: Row, ceiling: float, delta: float) -> int:
    """How many rounds of `row` fit beside the history by the fast bound: at least so many, up to a million."""
    short = joined(history)

    def within(rounds: int) -> bool:
        return bound((*short, Row(row.sigma, row.rate, row.steps * rounds)), delta) <= ceiling

    if not within(1):
        return int(fits(short, row, ceiling, delta))
    fitting, crossing = 1, 2
    while crossing <= MOST and within(crossing):
        fitting, crossing = crossing, 2 * crossing
    while crossing - fitting > 1:
        middle = (fitting + crossing) // 2
        fitting, crossing = (middle, crossing) if within(middle) else (fitting, middle)
    return min(fitting, MOST)


def _up(value: float) -> float:
    """The next point of the grid at or above `value`: a mantissa of `GRID` bits."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.ceil(math.ldexp(mantissa, GRID)), exponent - GRID)


@lru_cache(maxsize=1024)
def _renyi(sigma: float, rate: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(orders,) Renyi divergence of one step at each of `ORDERS`."""
    return np.asarray(compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=list(ORDERS)), np.float64)


@lru_cache(maxsize=64)
def _composed(rows: tuple[Row, ...], delta: float, bounded: float) -> float:
    """Epsilon by numerical composition, or `bounded` where the numbers do not carry it."""
    try:
        # Divisions by zero are the logarithm of 1 - rate where every patient is in every step, and right.
        with np.errstate(divide="ignore", over="raise", invalid="raise"):
            found = _numerical(rows, delta)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        _log.warning("numerical composition failed (%s), the Renyi bound stands in for it", error)
        return bounded
    return max(0.0, found) if math.isfinite(found) else bounded


def _numerical(rows: tuple[Row, ...], delta: float) -> float:
    """The upper end of epsilon by Opacus's composition, on a mesh of our own size.

    `PRVAccountant.get_epsilon` does the same with its own Renyi bound, which warns and is slower, and with a mesh that
    knows no limit. Raises what Opacus raises where numbers fail, ValueError where the mesh or the result cannot be
    trusted.
    """
    # Of delta, a thousandth is left to what lies outside the mesh.
    slack = delta / 1000
    steps = sum(row.steps for row in rows)
    # Remark 5.6 of the paper: the whole composition and each single step must lie within.
    single = max(bound((Row(row.sigma, row.rate, 1),), slack / (8 * steps)) for row in rows)
    half = max(bound(rows, slack / 4), single, ERROR) + 3
    mesh_of_one = 1 / math.sqrt(steps * math.log(12 / slack) / 2)
    error = max(ERROR, 2 * half / mesh_of_one * max(2, len(rows)) / POINTS)
    if error > COARSEST:
        raise ValueError(f"{steps} steps to epsilon {half:.0f} need too fine a mesh")
    domain = prv.Domain.create_aligned(-half, half, error * mesh_of_one)
    parts = [
        prv.discretize(
            prv.TruncatedPrivacyRandomVariable(prv.PoissonSubsampledGaussianPRV(row.rate, row.sigma), -half, half),
            domain,
        )
        for row in rows
    ]
    whole = prv.compose_heterogeneous(parts, [row.steps for row in rows])
    # What rounding took from the mass or made negative counts as lost from delta too.
    slack += float(abs(1 - whole.pmf.sum()) + abs(whole.pmf[whole.pmf < 0].sum()))
    if slack > delta / 2:
        raise ValueError(f"rounding is as large as delta {delta:g}")
    _, _, upper = whole.compute_epsilon(delta, slack, error)
    return float(upper)
