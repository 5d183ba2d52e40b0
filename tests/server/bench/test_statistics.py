"""Statistics: known answers, an independent implementation, coverage, speed."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from rin.server.bench.statistics import compare, macro_auc, mean_dice, resample_counts, weighted_auc

ONE = np.ones((1, 4))


@pytest.mark.parametrize(
    ("scores", "auc"),
    [
        ([0.1, 0.2, 0.8, 0.9], 1.0),
        ([0.9, 0.8, 0.2, 0.1], 0.0),
        ([0.5, 0.5, 0.5, 0.5], 0.5),
        ([0.1, 0.4, 0.3, 0.9], 0.75),
    ],
)
def test_auc_of_four_images_is_the_known_answer(scores: list[float], auc: float) -> None:
    assert weighted_auc(np.array(scores), np.array([False, False, True, True]), ONE).tolist() == [auc]


def test_auc_of_resamples_agrees_with_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.normal(size=60).round(1), rng.random(60) < 0.3
    (counts,) = resample_counts(60, None, resamples=25, seed=1)
    ours = weighted_auc(scores, positive, counts)
    theirs = [roc_auc_score(np.repeat(positive, row), np.repeat(scores, row)) for row in counts.astype(int)]
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_macro_auc_of_three_classes_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(3, size=90)
    scores = rng.dirichlet([1, 1, 1], size=90) + np.eye(3)[targets] * 0.2
    scores /= scores.sum(axis=1, keepdims=True)
    expected = roc_auc_score(targets, scores, multi_class="ovr", average="macro")
    assert macro_auc(scores, targets, np.ones((1, 90)))[0] == pytest.approx(expected, abs=1e-12)


def test_a_resample_without_positives_has_no_auc() -> None:
    counts = np.array([[1.0, 1, 0, 0]])
    assert np.isnan(weighted_auc(np.arange(4.0), np.array([False, False, True, True]), counts)).all()
    assert np.isnan(macro_auc(np.eye(4)[:, :2], np.array([0, 0, 1, 1]), counts)).all()


def test_dice_is_the_mean_over_images() -> None:
    assert mean_dice(np.array([0.0, 1.0, 0.5, 0.5]), np.array([[1.0, 1, 1, 1], [0, 4, 0, 0]])).tolist() == [0.5, 1.0]


def test_a_resample_draws_as_many_images_as_there_are_and_whole_patients() -> None:
    groups = np.array([7, 7, 7, 2, 2, 9])
    (images,) = resample_counts(6, None, resamples=100, seed=0)
    (patients,) = resample_counts(6, groups, resamples=100, seed=0)
    assert (images.sum(axis=1) == 6).all()
    assert (patients[:, 0] == patients[:, 1]).all()
    assert (patients[:, 3] == patients[:, 4]).all()
    assert (patients[:, 0] + patients[:, 3] + patients[:, 5] == 3).all()


def test_patients_widen_the_interval_of_repeated_images() -> None:
    dice = np.repeat(np.random.default_rng(3).random(20), 30)[None]
    plain, grouped = compare(dice, dice * 0.5), compare(dice, dice * 0.5, groups=np.repeat(np.arange(20), 30))
    assert grouped.checkpoint.high - grouped.checkpoint.low > 3 * (plain.checkpoint.high - plain.checkpoint.low)


def test_the_difference_is_paired() -> None:
    """A constant shift of every image's Dice is known exactly, however much the images themselves differ."""
    dice = np.random.default_rng(0).random((3, 200)) * 0.5
    result = compare(dice + 0.2, dice)
    assert result.difference.low == pytest.approx(0.2)
    assert result.difference.high == pytest.approx(0.2)
    assert result.random.high - result.random.low > 0.01


def test_seeds_are_averaged_as_statistics_not_as_predictions() -> None:
    targets = np.array([0, 0, 1, 1])
    good, bad = np.array([0.1, 0.2, 0.8, 0.9]), np.array([0.9, 0.8, 0.2, 0.1])
    both = np.stack([np.stack([1 - s, s], axis=1) for s in (good, bad)])
    result = compare(both, both, targets)
    assert result.checkpoint_seeds == (1.0, 0.0)
    assert result.checkpoint.value == 0.5
    assert (result.difference.low, result.difference.high) == (0.0, 0.0)


def test_the_same_arguments_give_the_same_interval() -> None:
    dice = np.random.default_rng(0).random((2, 50))
    assert compare(dice, dice[::-1]) == compare(dice, dice[::-1])
    assert compare(dice, dice[::-1], seed=1) != compare(dice, dice[::-1])


def test_one_class_and_different_test_sets_are_refused() -> None:
    scores = np.random.default_rng(0).random((2, 5, 2))
    with pytest.raises(ValueError, match="one class"):
        compare(scores, scores, np.zeros(5, np.int64))
    with pytest.raises(ValueError, match="different test sets"):
        compare(scores, scores[:, :4], np.array([0, 1, 0, 1, 0]))


def test_the_interval_covers_the_true_auc_about_95_times_in_100() -> None:
    """Binormal scores one standard deviation apart have AUC Phi(1/sqrt 2) = 0.7602."""
    rng, hits = np.random.default_rng(0), 0
    targets = np.arange(160) % 2
    for trial in range(200):
        score = rng.normal(size=160) + targets
        scores = np.stack([-score, score], axis=1)[None]
        found = compare(scores, scores, targets, resamples=400, seed=trial).checkpoint
        hits += found.low <= 0.760250 <= found.high
    assert 180 <= hits <= 199


def test_two_thousand_resamples_of_a_thousand_images_take_less_than_two_seconds() -> None:
    rng = np.random.default_rng(0)
    a, b, targets = rng.random((3, 1000, 2)), rng.random((3, 1000, 2)), rng.integers(2, size=1000)
    start = time.process_time()
    compare(a, b, targets, resamples=2000)
    assert time.process_time() - start < 2.0
