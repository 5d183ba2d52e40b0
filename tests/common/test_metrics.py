import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from rin.common.labels import label_index, label_set
from rin.common.metrics import auc, dice, log_softmax, macro_auc, outcomes, top_counts


def test_top_counts_look_at_declared_rows_only() -> None:
    logits = np.array([[0.1, 0.9, 5.0], [0.8, 0.2, 5.0], [0.3, 0.4, 5.0]])
    labels = np.array([[0, 1, 0], [0, 1, 0], [1, 1, 0]], dtype=bool)
    assert top_counts(logits, labels, (0, 1)) == {"top1": 2, "top5": 3, "images": 3}
    assert top_counts(logits, labels, (0, 1, 2)) == {"top1": 0, "top5": 3, "images": 3}


def test_outcomes_are_the_declared_rows_only() -> None:
    logits = np.array([[0.1, 0.9, 5.0], [0.8, 0.2, 5.0], [0.3, 0.4, 5.0]])
    labels = np.array([[0, 1, 0], [0, 1, 1], [1, 0, 0]], dtype=bool)
    found = outcomes(logits, labels, (0, 1), np.arange(3))
    assert found.predicted.tolist() == [1, 0, 1]
    assert found.place.tolist() == [0, 1, 1]
    assert found.labels.tolist() == [[False, True, False], [False, True, False], [True, False, False]]
    assert found.rows == (0, 1)
    counts = top_counts(logits, labels, (0, 1))
    assert counts["top1"] == (found.place == 0).sum() and counts["top5"] == (found.place < 5).sum()


def test_the_softmax_is_over_declared_rows() -> None:
    logits = np.array([[1.0, 2.0, 300.0], [-1000.0, 1000.0, 0.0]], np.float32)
    found = np.exp(log_softmax(logits, (0, 1)))
    assert found.sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert found[:, 2].tolist() == [0.0, 0.0]
    assert found[0, 1] / found[0, 0] == pytest.approx(np.e)


def test_auc_counts_ties_as_half() -> None:
    assert auc(np.array([0.0, 1.0, 1.0, 2.0]), np.array([False, False, True, True])) == pytest.approx(0.875)


def test_auc_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 3, 50, 1000):
        positive = np.arange(n) % 3 == 0
        for scores in (rng.normal(size=n), rng.integers(0, 4, n).astype(float)):
            assert auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)


def _case(names: list[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.zeros((n * len(names), len(label_set())), dtype=bool)
    for i, name in enumerate(names):
        labels[i * n : (i + 1) * n, label_index()[name]] = True
    return np.zeros(labels.shape), labels


def test_macro_auc_gives_no_credit_for_telling_modalities_apart() -> None:
    names = ["CT_lung_Nodule", "CT_lung_normal", "MR_brain_edema", "MR_brain_normal"]
    scores, labels = _case(names, 20)
    for name in names:  # right modality, nothing else
        other = [n for n in names if n[:2] == name[:2]]
        scores[labels[:, [label_index()[n] for n in other]].any(1), label_index()[name]] = 1.0
    found = macro_auc(scores, labels)
    assert found.mean == 0.5
    assert sorted(found.by_row) == sorted(label_index()[name] for name in names)
    scores[:20, label_index()["CT_lung_Nodule"]] = 2.0
    assert macro_auc(scores, labels).by_row[label_index()["CT_lung_Nodule"]] == 1.0


def test_macro_auc_leaves_out_rare_labels() -> None:
    scores, labels = _case(["CT_lung_Nodule", "CT_lung_normal"], 9)
    assert macro_auc(scores, labels).by_row == {}
    assert np.isnan(macro_auc(scores, labels).mean)
    assert len(macro_auc(scores, labels, min_cases=9).by_row) == 2


def test_dice() -> None:
    a = np.zeros((3, 4, 4), bool)
    b = np.zeros((3, 4, 4), bool)
    a[0, :2], b[0, 1:3] = True, True
    a[1, 0, 0] = True
    assert dice(a, b).tolist() == [0.5, 0.0, 1.0]
