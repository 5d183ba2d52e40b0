"""What is said of the patients' protection: as much as the claims, in words and as JSON."""

from __future__ import annotations

import json

from rin.common.chain import MECHANISM, Head
from rin.common.statement import ASSUMPTIONS, NOT_COVERED, UNPROTECTED, facts, of_update, words
from rin.common.wire import Claim

CLAIM = Claim(epsilon=1.25, delta=1e-5, mechanism=MECHANISM, ledger=Head(count=3, digest="0" * 64))


def test_a_checkpoint_of_private_sites_says_each_claim_and_what_it_rests_on() -> None:
    other = CLAIM.model_copy(update={"epsilon": 2.5})
    said = facts({"siteB": other, "siteA": CLAIM})
    assert said == facts({"siteA": CLAIM, "siteB": other})  # the same bytes in whatever order they came
    assert f"siteA: {words(CLAIM)}; siteB: {words(other)}" in said["privacy"]
    assert all(text in said["privacy"] for text in (*ASSUMPTIONS, *NOT_COVERED, "PRV", "one patient"))
    assert Claim.model_validate(said["privacy_sites"]["siteB"]) == other
    json.dumps(said, allow_nan=False)


def test_without_claims_nothing_is_claimed() -> None:
    assert facts({}) == {}
    assert of_update(None) == UNPROTECTED
    assert "could reconstruct training images" in UNPROTECTED


def test_words_never_round_a_claim_down() -> None:
    large = CLAIM.model_copy(update={"epsilon": 1234.562, "delta": 1.23456789e-6})
    assert words(large).startswith("(1234.562, 1.23456789e-06)-")


def test_an_update_says_the_epsilon_that_its_claim_has() -> None:
    assert of_update(CLAIM).startswith("(1.25, 1e-05)-differential privacy for each patient")


def test_a_ledger_that_a_person_took_over_is_named() -> None:
    assert "took that ledger over" not in words(CLAIM) and "its entry 3" in words(CLAIM)
    said = facts({"siteA": CLAIM.model_copy(update={"adopted": 2})})
    assert "took that ledger over as it was found, 2 times" in said["privacy"]
    assert said["privacy_sites"]["siteA"]["adopted"] == 2
