"""The maths of the attack report, and that it attacks what a site would train."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from rin.client.policy import check
from rin.client.site import Site
from rin.common.accountant import Row, epsilon
from rin.common.backbones import initial
from tests.benchmarks import inversion, membership
from tests.benchmarks.likeness import psnr, ssim
from tests.benchmarks.patients import sigma_for


def test_psnr_counts_decibels_below_full_scale() -> None:
    picture = np.linspace(0, 0.9, 64).reshape(8, 8)
    assert psnr(picture, picture + 0.1) == pytest.approx(20)
    assert psnr(picture, picture + 0.01) == pytest.approx(40)
    assert psnr(picture, picture) == math.inf


def test_ssim_is_one_for_the_same_picture_and_compares_means_of_flat_ones() -> None:
    rng = np.random.default_rng(0)
    picture, noise = rng.random((32, 32)), rng.random((32, 32))
    assert ssim(picture, picture) == pytest.approx(1)
    assert ssim(picture, noise) == pytest.approx(ssim(noise, picture))
    assert abs(ssim(picture, noise)) < 0.1
    flat = ssim(np.full((32, 32), 0.2), np.full((32, 32), 0.6))
    assert flat == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4))


def test_the_place_counts_those_who_are_at_least_as_alike() -> None:
    rng = np.random.default_rng(0)
    true, others = rng.random((8, 8)), rng.random((5, 8, 8))
    assert inversion.place(0.1 * true + 0.3, true, others) == 1
    assert inversion.place(others[2], true, others) == 2
    assert inversion.place(-true, true, others) == 6


def test_the_curve_has_the_area_of_the_library_with_ties_too() -> None:
    rng = np.random.default_rng(1)
    inside = rng.random((8, 50)) < 0.5
    scores = np.round(rng.standard_normal((8, 50)) + inside, 1)
    curve = membership.rates(scores, inside)
    assert membership.area(curve) == pytest.approx(roc_auc_score(inside.ravel(), scores.ravel()))
    assert (curve[0][0], curve[1][0], curve[0][-1], curve[1][-1]) == (0, 0, 1, 1)


def test_found_at_a_rate_of_false_alarms_are_those_above_its_threshold() -> None:
    scores = np.array([[9.0, 8.0, 7.0, 6.0, 5.0]])
    inside = np.array([[True, True, False, True, False]])
    curve = membership.rates(scores, inside)
    assert membership.at(curve, 0.4) == pytest.approx(2 / 3)
    assert membership.at(curve, 0.5) == pytest.approx(1)


def shadows(signal: float, seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose level is another for each patient, so that one threshold for all is worth little."""
    rng = np.random.default_rng(seed)
    inside = rng.random((40, 60)) < 0.5
    return 5 * rng.standard_normal(60) + rng.standard_normal((40, 60)) + signal * inside, inside


def test_likelihood_ratios_see_what_one_threshold_does_not() -> None:
    scores, inside = shadows(2.0)
    assert membership.area(membership.rates(scores, inside)) < 0.7
    ratios = membership.likelihood_ratios(scores, inside)
    assert membership.area(membership.rates(ratios, inside)) > 0.88  # 0.92 with the true means


def test_likelihood_ratios_find_nothing_where_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    areas, intervals = [], []
    monkeypatch.setattr(membership, "DRAWS", 200)
    for seed in range(8):
        scores, inside = shadows(0.0, seed)
        found = membership.measured(membership.likelihood_ratios(scores, inside), inside)
        areas.append(found.auc)
        intervals.append(found.auc_interval)
    assert abs(np.mean(areas) - 0.5) < 0.02  # their deviation is 0.018 each
    assert sum(low < 0.5 < high for low, high in intervals) >= 7


def test_intervals_hold_what_was_measured_and_narrow_with_more_models() -> None:
    scores, inside = shadows(2.0)
    ratios = membership.likelihood_ratios(scores, inside)
    many, few = membership.measured(ratios, inside), membership.measured(ratios[:10], inside[:10])
    for found in (many, few):
        assert found.auc_interval[0] < found.auc < found.auc_interval[1]
        assert found.tpr_interval[0] <= found.tpr <= found.tpr_interval[1]
    assert np.ptp(many.auc_interval) < np.ptp(few.auc_interval)


def test_likelihood_ratios_never_look_at_who_was_in_the_attacked_training() -> None:
    scores, inside = shadows(2.0)
    turned = inside.copy()
    turned[3] = ~turned[3]
    one, other = (membership.likelihood_ratios(scores, who) for who in (inside, turned))
    assert np.array_equal(one[3], other[3])
    assert not np.array_equal(one[4], other[4])


def test_rates_by_label_share_one_threshold() -> None:
    scores, inside = shadows(0.0)
    wrong = np.arange(60) < 20
    scores += 8.0 * (inside & wrong)
    seen = membership.Watched("", scores[:, None], inside, wrong, 0.0)
    found, rest = membership.found_by_label(seen)
    assert found > 0.95
    assert rest < 0.1


def test_too_few_shadow_models_are_an_error() -> None:
    with pytest.raises(ValueError, match="more models"):
        membership.likelihood_ratios(np.zeros((3, 4)), np.ones((3, 4), bool))


def test_no_privacy_budget_allows_chance_and_the_accountant_never_more_than_the_claim() -> None:
    false = np.linspace(0, 1, 21)
    assert membership.allowed(false, 0.0, 0.0) == pytest.approx(false)
    claimed = membership.allowed(false, 8.0, membership.DELTA)
    accounted = membership.accounted(false, 8.0)
    assert (accounted <= claimed + 1e-3).all()
    assert (accounted >= false - 1e-9).all()
    assert (np.diff(accounted) >= 0).all()


def test_sigma_is_the_smallest_within_the_budget() -> None:
    sigma = sigma_for(8.0, rate=0.064, steps=300, delta=1e-5)
    assert epsilon([Row(sigma, 0.064, 300)], 1e-5) <= 8.0 < epsilon([Row(sigma - 0.01, 0.064, 300)], 1e-5)


def test_confidence_is_the_log_odds_of_the_patients_label() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(membership.BACKBONES, "resnet18", membership.NETWORK)
        network = initial(membership.plan_off().model, 0)
    held, _ = membership.pool(0)
    found = membership.confidence(network, held)
    with torch.inference_mode():
        shares = network(torch.from_numpy(held.pixels[:2]))[:, membership.HEAD].double().softmax(1).numpy()
    own = shares[:, membership.HEAD.index(held.rows[0])]
    assert found.shape == (membership.PATIENTS,)
    assert found[0] == pytest.approx(np.log(own / (1 - own)).mean())


def test_the_attacked_floors_are_those_of_a_sites_default_policy() -> None:
    policy = {"privacy": "none", "none-agreed-by": "a person", "none-agreed-on": "2026-11-23"}
    site = Site.model_validate({"site": inversion.SITE, "policy": policy})
    kept, bare = inversion.plan_off(8, 8, 1e-4), inversion.plan_off(1, 1, 1e-3)
    assert check(kept, "0" * 64, site, {"0" * 64}, patients=inversion.FLOOR) == []
    assert len(check(bare, "0" * 64, site, {"0" * 64}, patients=1)) == 3  # steps, batch, patients


def test_a_head_that_picks_a_label_lets_one_patient_of_twenty_through() -> None:
    held = inversion.patients()
    row = int(held.rows[0])
    network = inversion.picking(initial(inversion.plan_off(1, 1, 1.0).model, 0), row)
    before = [p.detach().clone() for p in network.parameters()]
    among = inversion.update_of(network, held, inversion.plan_off(8, 8, 3e-5))
    alone = inversion.update_of(network, held.only(held.patient == 0), inversion.plan_off(1, 1, 3e-5))
    assert all(torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))
    names = [name for name, _ in network.named_parameters()]
    one, other = (
        torch.cat([value.flatten() for name, value in zip(names, update, strict=True) if "head" not in name])
        for update in (among, alone)
    )
    assert torch.cosine_similarity(one, other, dim=0) > 0.98
