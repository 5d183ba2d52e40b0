"""The gate before a private round: no figures of a plan talk it past the budget, and none keep it busy for ever."""

from __future__ import annotations

import itertools
import math
import time
from typing import Final

import numpy as np
import pytest
from scipy.stats import binom, norm

from rin.client.policy import check
from rin.client.private import gate
from rin.common.accountant import Row, epsilon, fits
from rin.common.errors import RefusedError
from rin.common.plan import parse_plan
from tests.client import fuzzed_plans
from tests.client.test_policy_fuzz import site


def at_least(row: Row, ceiling: float) -> float:
    """The delta that the row has at epsilon `ceiling`, or less, by no accountant: from the sum of all its outputs.

    For a patient who is in it, the sum is normal around a binomial number; for one who is not, around 0.
    """
    counts, scale = np.arange(row.steps + 1), row.sigma * math.sqrt(row.steps)
    cuts = row.steps * row.rate + scale * np.arange(-6, 15, 0.25)
    inside = norm.sf(cuts[:, None], counts, scale) @ binom.pmf(counts, row.steps, row.rate)
    return float(np.max(inside - math.exp(min(ceiling, 700)) * norm.sf(cuts, 0, scale)))


QUICK: Final = ((0.3, 1.0), (1e4, 0.2))  # noise and rate
OTHERS: Final = tuple(set(itertools.product((0.3, 0.5, 1.0, 20.0, 1e4), (1e-9, 1e-3, 0.2, 1.0))) - set(QUICK))


# A tiny rate makes a mean that scipy calls divergent; what comes out is above the truth, see the assertion.
@pytest.mark.filterwarnings("ignore:The integral is probably divergent:Warning")
@pytest.mark.parametrize(
    ("sigma", "rate"), [*QUICK, *(pytest.param(*figures, marks=pytest.mark.slow) for figures in sorted(OTHERS))]
)
def test_no_figures_talk_the_gate_past_the_budget(sigma: float, rate: float) -> None:
    for steps, (ceiling, delta) in itertools.product((40, 10**6), ((3.0, 1e-6), (1e-300, 9.9e-3), (1e308, 1e-300))):
        row, began = Row(sigma, rate, steps), time.process_time()
        admitted = fits((), row, ceiling, delta)
        assert time.process_time() - began < 20
        if admitted and steps < 100:
            assert at_least(row, ceiling) <= delta
        if admitted:
            assert epsilon([row], delta) <= ceiling
        assert admitted or ceiling < 1e308


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [
        *itertools.product((math.nan, math.inf, -1.0, 0.0, 1e-308, 0.29), (0.1,), (1,)),
        *itertools.product((1.0,), (math.nan, math.inf, -0.1, 0.0, -0.0, 1.0000000000000002), (1,)),
        *itertools.product((1.0,), (0.1,), (0, -1)),
    ],
)
def test_figures_outside_their_range_never_reach_the_accountant(sigma: float, rate: float, steps: int) -> None:
    with pytest.raises(ValueError, match="must"):
        Row(sigma, rate, steps)


def test_the_dearest_plan_that_a_site_may_admit_is_refused_by_its_budget() -> None:
    private = {**fuzzed_plans.PRIVATE["privacy"], "sigma": 0.3, "patients": 10**7, "delta": 1e-3}
    text = {**fuzzed_plans.PRIVATE, "privacy": private, "training": fuzzed_plans.PLAN["training"]}
    text["training"] = {**text["training"], "local-steps": 1_000_000}
    plan = parse_plan(fuzzed_plans.dumps(text).encode())
    here = site(plans="any", patients=10**7, max_rate=1.0, min_sigma=0.3, max_steps=10**6, delta=1e-9)
    assert check(plan, "d" * 64, here, frozenset(), patients=0) == []
    with pytest.raises(RefusedError) as caught:
        gate(plan, here)([])
    assert caught.value.code == "budget"
