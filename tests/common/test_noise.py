"""The randomness of privacy: distributions, independence of every seed, and that no key can be kept."""

from __future__ import annotations

import copy
import math
import pickle
import random

import numpy as np
import pytest
import torch
from scipy import stats

from rin.common.noise import BLOCK, Source


def test_normals_are_normal() -> None:
    drawn = Source().normals(3_000_001)
    assert drawn.dtype == np.float32
    assert np.isfinite(drawn).all()
    values = drawn.astype(np.float64)
    spread = (values**2).sum()
    assert abs(spread - len(values)) < 6 * math.sqrt(2 * len(values))  # chi-squared
    assert abs(values.mean()) < 6 / math.sqrt(len(values))
    assert stats.kstest(values, "norm").pvalue > 1e-6
    assert 4.5 < np.abs(values).max() < 7.5
    kurtosis = stats.kurtosis(values)
    assert abs(kurtosis) < 6 * math.sqrt(24 / len(values))


def test_neighbouring_values_are_independent_within_and_across_blocks() -> None:
    values = Source().normals(8 * BLOCK).astype(np.float64)
    for lag in (1, 2, BLOCK, 2 * BLOCK, 4 * BLOCK):
        correlation = np.corrcoef(values[:-lag], values[lag:])[0, 1]
        assert abs(correlation) < 6 / math.sqrt(len(values) - lag), lag


def test_each_place_is_chosen_by_itself_at_the_rate() -> None:
    source, places, turns, rate = Source(), 200, 2_000, 0.07
    hits, sizes = np.zeros(places), []
    for _ in range(turns):
        chosen = source.chosen(places, rate)
        assert np.array_equal(chosen, np.unique(chosen))
        hits[chosen] += 1
        sizes.append(len(chosen))
    deviation = math.sqrt(turns * rate * (1 - rate))
    assert np.abs(hits - turns * rate).max() < 6 * deviation
    assert np.var(sizes) == pytest.approx(places * rate * (1 - rate), rel=0.25)
    assert np.array_equal(source.chosen(5, 1.0), np.arange(5))
    assert len(source.chosen(0, 0.5)) == 0


def test_some_are_drawn_without_replacement_and_evenly() -> None:
    source, hits = Source(), np.zeros(7)
    for _ in range(7_000):
        drawn = source.some(7, 3)
        assert len(set(drawn.tolist())) == 3
        hits[drawn] += 1
    assert np.abs(hits - 3_000).max() < 6 * math.sqrt(7_000 * 3 / 7 * 4 / 7)
    assert np.array_equal(source.some(2, 3), [0, 1])


def test_no_seed_repeats_it() -> None:
    draws = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        draws.append(Source().normals(64))
    assert not np.array_equal(draws[0], draws[1])
    assert len({Source().seed() for _ in range(20)}) == 20


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_its_key_cannot_be_taken_along(take: object) -> None:
    with pytest.raises(TypeError, match="stay in memory"):
        take(Source())  # type: ignore[operator]
