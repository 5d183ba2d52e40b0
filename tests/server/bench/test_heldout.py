"""Curves and confusion pictures of the figures on held-out patients, and their place in the report."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from rin.common.disclosure import Outcomes, published
from rin.common.labels import label_set
from rin.common.scores import groups
from rin.server.bench.heldout import confusions, curves, shares
from rin.server.bench.history import rounds_of
from rin.server.bench.report import render
from rin.server.bench.summary import RoundFacts
from rin.server.record import Record, write_record
from rin.server.rundir import RunDir
from rin.server.validation import Validation, summed
from tests.server.bench.test_report import summary

BRAIN = [label.index for label in groups()["MR", "brain"]][:4]
THYROID = [label.index for label in groups()["US", "usthyroid"]]
ROWS = (*BRAIN, *THYROID)


def figures(seed: int, n: int = 2000) -> Validation:
    rng = np.random.default_rng(seed)
    true = rng.choice(ROWS, n)
    predicted = np.where(rng.random(n) < 0.5, true, rng.choice(ROWS, n))
    labels = np.zeros((n, len(label_set())), bool)
    labels[np.arange(n), true] = True
    place = np.where(true == predicted, 0, 1 + (true + predicted) % 6)
    images = Outcomes(labels, predicted, place, np.arange(n), ROWS)
    areas = {row: 0.5 + 0.01 * i for i, row in enumerate(ROWS)}
    sent = published(images, areas, frozenset({"validation", "confusion", "auc"}))
    found = summed({"siteA": sent}, {"siteA": ROWS}, {"siteA": 1.0})
    assert found is not None
    return found


def rounds(count: int) -> tuple[RoundFacts, ...]:
    return tuple(RoundFacts(number, 1.0, (), (), figures(number)) for number in range(1, count + 1))


def drawing(uri: str) -> str:
    assert uri.startswith("data:image/svg+xml;base64,")
    return base64.b64decode(uri.partition(",")[2]).decode()


def test_the_curves_are_of_the_checkpoint_before_the_round() -> None:
    found = dict(curves(rounds(3)))
    assert list(found) == ["top-1 accuracy", "balanced accuracy", "mean AUC"]
    for uri in found.values():
        assert "checkpoint" in drawing(uri)
    assert "MR brain" in drawing(found["mean AUC"])


def test_nothing_sent_draws_nothing() -> None:
    assert curves((RoundFacts(1, 1.0, ()),)) == []
    assert "Held-out" not in render(summary(), {})


def test_a_confusion_picture_accounts_for_every_image_that_is_known() -> None:
    found = figures(1)
    assert [name for name, _ in confusions(found)] == ["MR brain", "US usthyroid"]
    rows, parts = shares(found.groups[0])
    assert rows == BRAIN
    assert parts.shape == (4, 6)
    assert parts.sum(1) == pytest.approx(np.ones(4))
    first = found.groups[0].recalls[0]
    assert parts[0, 0] == pytest.approx(first.right / first.of)
    assert parts[0, 4] > 0  # thyroid labels, which no row here has


def test_a_group_of_one_known_label_has_no_picture() -> None:
    assert confusions(figures(1, n=60)) == []


def test_the_report_shows_figures_table_and_closing_round() -> None:
    page = summary(rounds=rounds(6))
    text = render(page, {})
    assert "Held-out patients of the sites" in text and "Checkpoint 5" in text
    assert "5 of 5 rounds" in text and ">closing<" in text
    assert text.count("What was taken for what") == 2
    json.dumps(page.to_json())


def test_the_history_tells_the_figures(tmp_path: Path) -> None:
    run, digest = RunDir(tmp_path), "0" * 64
    facts = Record(round=1, state="closed", plan=digest, base=digest, cohort=("siteA",), validation=figures(1))
    write_record(run, facts)
    assert rounds_of(run)[0].validation == figures(1)
