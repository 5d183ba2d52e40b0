"""The audit through the real step: a right release passes, and each planted fault is found."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from rin.client import audit as site_audit
from rin.client.audit import CANARIES, CLAIMS, DELTA, checks, released
from rin.client.cli import app
from rin.common import audit, private
from rin.common.accountant import epsilon
from rin.common.noise import Source

CLAIM = 4.0
SIGMA = 1.11


class Known(Source):
    """A source whose noise starts from a seed that somebody else knows: what must never be."""

    def __init__(self) -> None:
        super().__init__()
        self._draws = np.random.default_rng(7)

    def normals(self, count: int) -> np.ndarray:
        return self._draws.standard_normal(count).astype(np.float32)


def test_a_right_release_passes_and_every_claim_is_testable() -> None:
    found = checks()
    assert all(check.passed for check in found), [check for check in found if not check.passed]
    names = [check.name for check in found]
    assert names.count("one-run") == len(CLAIMS)
    assert {"sensitivity", "noise-spread", "noise-shape", "noise-independence", "accountants"} <= set(names)
    assert sum(name.startswith("sampling") for name in names) == 5
    assert all(epsilon([row], DELTA) <= CLAIM for row in CLAIMS)
    assert max(check.value for check in found if check.name == "one-run") > 0.5, "it shows nothing at all"


def test_clipping_images_instead_of_patients_is_caught() -> None:
    assert audit.one_run(*released(SIGMA, 1, images=10), CLAIM, DELTA).passed
    assert not audit.one_run(*released(SIGMA, 1, images=10, bags=lambda bag: bag.split(1)), CLAIM, DELTA).passed


def test_a_step_without_noise_is_caught() -> None:
    assert not audit.one_run(*released(0.0, 1), CLAIM, DELTA).passed


def test_noise_from_a_seed_that_somebody_knows_is_caught() -> None:
    scores, included = released(SIGMA, 1, source=Known())
    assert audit.one_run(scores, included, CLAIM, DELTA).passed  # to whoever does not know the seed
    known = Known().normals(CANARIES) * SIGMA
    assert not audit.one_run(scores - known, included, CLAIM, DELTA).passed


def test_noise_that_repeats_and_a_clip_that_lets_through_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_audit, "NOISE", 100_000)
    with monkeypatch.context() as patch:
        patch.setattr(site_audit, "Source", Known)
        assert {check.name for check in site_audit.noise() if not check.passed} == {"noise-independence"}
    with monkeypatch.context() as patch:
        patch.setattr(private, "squared_norm", lambda values: sum(v.double().square().sum() for v in values) * 0.98)
        assert [check.passed for check in site_audit.sensitivity()] == [False, False]


def test_the_command_prints_every_check_and_says_when_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = audit.Check("sensitivity", 0.5, 0.7, "how far")
    monkeypatch.setattr(site_audit, "checks", lambda progress: [progress(right) or right])
    done = CliRunner().invoke(app, ["audit"])
    assert done.exit_code == 0 and "sensitivity" in done.output
    wrong = audit.Check("one-run", 5.0, 4.0, "shown")
    monkeypatch.setattr(site_audit, "checks", lambda progress: [progress(each) or each for each in (right, wrong)])
    done = CliRunner().invoke(app, ["audit", "--json"])
    assert done.exit_code == 1
    assert [(row["name"], row["passed"]) for row in json.loads(done.stdout)] == [
        ("sensitivity", True),
        ("one-run", False),
    ]
