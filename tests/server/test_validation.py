"""Sums over sites: exact where nothing is withheld, and never on the wrong side of the truth where something is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from sklearn.metrics import balanced_accuracy_score, confusion_matrix

from rin.common.disclosure import Outcomes, published
from rin.common.labels import label_set
from rin.common.scores import GroupScores, groups
from rin.server.validation import Recall, Share, Validation, summed, table

BRAIN = [label.index for label in groups()["MR", "brain"]][:4]
THYROID = [label.index for label in groups()["US", "usthyroid"]]
ROWS = (*BRAIN, *THYROID)
ALL = frozenset({"validation", "confusion", "auc"})
WEIGHTS = {"siteA": 1.0, "siteB": 3.0, "siteC": 0.5}


def outcomes(true: np.ndarray, predicted: np.ndarray, rows: Sequence[int] = ROWS) -> Outcomes:
    labels = np.zeros((len(true), len(label_set())), bool)
    labels[np.arange(len(true)), true] = True
    place = np.where(true == predicted, 0, 1 + (true + predicted) % len(rows))
    return Outcomes(labels, predicted, place, np.arange(len(true), dtype=np.int64), tuple(rows))


def drawn(seed: int, n: int, right: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.choice(ROWS, n)
    return true, np.where(rng.random(n) < right, true, rng.choice(ROWS, n))


def sites(images: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Validation:
    scores = {site: published(outcomes(*pair), {}, ALL) for site, pair in images.items()}
    found = summed(scores, dict.fromkeys(images, ROWS), WEIGHTS)
    assert found is not None
    return found


def test_sums_equal_those_of_all_images_together() -> None:
    images = {site: drawn(seed, 3000, 0.4) for seed, site in enumerate(WEIGHTS)}
    true, predicted = (np.concatenate(part) for part in zip(*images.values(), strict=True))
    found = sites(images)
    assert found.images == 9000
    assert found.top1 == Share(int((true == predicted).sum()), 9000)
    expected = balanced_accuracy_score(true, predicted)
    assert found.balanced is not None
    assert (found.balanced.low, found.balanced.value, found.balanced.high) == pytest.approx((expected,) * 3, abs=1e-12)
    matrix = confusion_matrix(true, predicted, labels=ROWS)
    for group in found.groups:
        own = [label.index for label in groups()[group.modality, group.anatomy] if label.index in ROWS]
        mine = np.isin(true, own)
        assert (group.images, group.labels) == (int(mine.sum()), len(own))
        assert group.top1 == Share(int((true == predicted)[mine].sum()), int(mine.sum()))
        diagonal = [Recall(row, int(matrix[i, i]), int(matrix[i].sum()), 0) for i, row in enumerate(ROWS)]
        assert list(group.recalls) == [recall for recall in diagonal if recall.row in own]
        cells = {
            (t, p): int(matrix[i, j]) for i, t in enumerate(ROWS) for j, p in enumerate(ROWS) if t in own and t != p
        }
        assert {(t, p): n for t, p, n in group.cells} == cells


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 400), st.floats(0, 1)), min_size=1, max_size=3, unique=True
    )
)
@settings(max_examples=100, deadline=None)
def test_the_truth_lies_within_the_bounds(drawings: list[tuple[int, int, float]]) -> None:
    images = {site: drawn(*drawing) for site, drawing in zip(WEIGHTS, drawings, strict=False)}
    scores = {site: published(outcomes(*pair), {}, ALL) for site, pair in images.items()}
    found = summed(scores, dict.fromkeys(images, ROWS), WEIGHTS)
    for group in found.groups if found else ():
        numbers = {s: each for s in scores for each in scores[s] if each.group == (group.modality, group.anatomy)}
        sent = [s for s, each in numbers.items() if isinstance(each.top1, int)]
        if group.balanced is None or len(sent) < len(numbers):  # words for a whole group are taken as none or all
            continue
        truth = []
        for recall in group.recalls:
            here = [images[s] for s in sent if recall.row in dict(numbers[s].positives)]
            true, predicted = (np.concatenate(part) for part in zip(*here, strict=True))
            truth.append(float((predicted[true == recall.row] == recall.row).mean()))
            assert recall.of == (true == recall.row).sum()
        assert group.balanced.low - 1e-9 <= np.mean(truth) <= group.balanced.high + 1e-9
        assert group.balanced.low - 1e-9 <= group.balanced.value <= group.balanced.high + 1e-9


def scores(site_auc: list[tuple[int, float]], **changes: object) -> tuple[GroupScores, ...]:
    facts = {"modality": "US", "anatomy": "usthyroid", "images": 100, "auc": tuple(site_auc), **changes}
    return (GroupScores(**facts),)  # type: ignore[arg-type]


def test_auc_is_the_mean_by_the_declared_weights_of_the_sites_that_have_it() -> None:
    a, b = THYROID
    sent = {"siteA": scores([(a, 0.9), (b, 0.6)]), "siteB": scores([(a, 0.5)]), "siteC": ()}
    found = summed(sent, dict.fromkeys(sent, THYROID), WEIGHTS)
    assert found is not None
    (group,) = found.groups
    assert group.sites == ("siteA", "siteB")
    assert dict(group.auc) == pytest.approx({a: (0.9 + 3 * 0.5) / 4, b: 0.6})
    assert found.macro_auc == pytest.approx((0.6 + 0.6) / 2)
    assert (found.top1, found.balanced) == (None, None)


def test_words_are_none_or_all_and_said_to_be_rough() -> None:
    a, b = THYROID
    positives = ((a, 60), (b, 40))
    sent = {
        "siteA": scores([], top1="most", top5=100, positives=positives),
        "siteB": scores([], top1="few", top5=100, positives=positives),
        "siteC": scores([], top1=50, top5=None, positives=positives, hits=((a, 40), (b, 10))),
    }
    found = summed(sent, dict.fromkeys(sent, THYROID), WEIGHTS)
    assert found is not None
    assert (found.top1, found.top5) == (Share(150, 300, 200), Share(200, 200))
    assert found.groups[0].recalls == (Recall(a, 40, 180, 120), Recall(b, 10, 120, 80))
    value = ((60 + 40) / 180 + (40 + 10) / 120) / 2
    assert found.balanced is not None
    assert dataclasses.astuple(found.balanced) == pytest.approx((value,) * 3)
    assert table(found)[0][2:5] == ("≈ 50.0 %", "100.0 %", "48.6 %")


def test_labels_that_no_site_counts_are_left_out_and_said_to_be() -> None:
    a, _ = THYROID
    found = summed({"siteA": scores([], top1=50, positives=((a, 60),))}, {"siteA": THYROID}, WEIGHTS)
    assert found is not None
    assert table(found) == [
        ("US usthyroid", "100", "50.0 %", "withheld", "50.0 % (16.7 to 83.3)", "1 of 2", "withheld")
    ]


def test_nothing_sent_is_nothing() -> None:
    assert summed({"siteA": (), "siteB": ()}, dict.fromkeys(("siteA", "siteB"), ROWS), WEIGHTS) is None


def test_contradicting_counts_do_no_harm() -> None:
    a, b = THYROID
    sent = {"siteA": scores([], top1=90, positives=((a, 60), (b, 40)), hits=((a, "few"), (b, "few")))}
    found = summed(sent, {"siteA": THYROID}, WEIGHTS)
    assert found is not None and found.balanced is not None
    assert 0 <= found.balanced.low <= found.balanced.high <= 1


def test_figures_survive_json() -> None:
    found = sites({site: drawn(seed, 500, 0.5) for seed, site in enumerate(WEIGHTS)})
    adapter = TypeAdapter(Validation)
    assert adapter.validate_json(json.dumps(json.loads(adapter.dump_json(found)))) == found
