"""The wire form of validation figures: bounded, and no figures that contradict each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rin.common.errors import RefusedError
from rin.common.files import canonical_json
from rin.common.labels import label_set
from rin.common.scores import MAX_CELLS, GroupScores, fault, groups, interval
from rin.common.wire import MAX_MANIFEST, Manifest, from_bytes

ROWS = [label.index for label in groups()["MR", "brain"]]
A, B, C = ROWS[:3]
GOOD: dict[str, Any] = {
    "modality": "MR",
    "anatomy": "brain",
    "images": 100,
    "top1": 60,
    "top5": 80,
    "positives": [[A, 50], [B, 40]],
    "hits": [[A, 30], [B, "most"]],
    "cells": [[A, B, 11]],
    "auc": [[A, 0.75]],
}


def read(value: dict[str, Any]) -> GroupScores:
    return GroupScores.model_validate_json(json.dumps(value))


def faults(change: dict[str, Any], declared: Sequence[int] = tuple(ROWS)) -> str:
    return fault([read(GOOD | change)], declared)


def largest() -> tuple[GroupScores, ...]:
    """The longest figures that the model takes and a site can come to: every label, the most cells, long numbers."""
    cells = [(t.index, p.index) for t in label_set() for p in label_set() if t.index != p.index][-MAX_CELLS:]
    found = []
    for (modality, anatomy), labels in groups().items():
        rows = [label.index for label in labels]
        found.append(
            GroupScores(
                modality=modality,
                anatomy=anatomy,
                images=9_999_000,
                top1=9_998_000,
                top5=9_999_000,
                positives=tuple((row, 1_234_000) for row in rows),
                hits=tuple((row, 1_233_000) for row in rows),
                cells=tuple((true, predicted, 12_340) for true, predicted in cells if true in rows),
                auc=tuple((row, 0.1234) for row in rows),
            )
        )
    return tuple(found)


def manifest(scores: tuple[GroupScores, ...]) -> Manifest:
    digest = "a" * 64
    return Manifest(
        run="b" * 32,
        round=99_999,
        site="s" * 32,
        plan=digest,
        base=digest,
        request=digest,
        update=digest,
        steps=1_000_000,
        labels=tuple(range(len(label_set()))),
        metrics={"loss": 1.234e-05, "top1": 123400000.0, "top5": 123400000.0, "images": 123400000.0},
        scores=scores,
        release="9" * 64,
        lock=digest,
    )


def test_the_largest_manifest_fits() -> None:
    sent = manifest(largest())
    assert sum(len(group.cells) for group in sent.scores) == MAX_CELLS
    assert 0.8 * MAX_MANIFEST < len(sent.to_bytes()) <= MAX_MANIFEST
    assert from_bytes(Manifest, sent.to_bytes(), code="update-manifest") == sent


def test_good_figures_have_no_fault() -> None:
    assert faults({}) == ""
    assert fault((), ROWS) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"images": 9},
        {"images": -5},
        {"images": 10**12},
        {"images": 100.0},
        {"top1": 3},
        {"top1": "many"},
        {"top1": True},
        {"positives": [[A, 9]]},
        {"positives": [[A]]},
        {"positives": [[-1, 20]]},
        {"positives": [["a", 20]]},
        {"hits": [[A, "few", 3]]},
        {"cells": [[A, B, 20]] * (MAX_CELLS + 1)},
        {"auc": [[A, 1.5]]},
        {"auc": [[A, "0.5"]]},
        {"modality": "MR<script>"},
        {"anatomy": ""},
        {"patients": 12},
    ],
)
def test_what_the_model_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        read(GOOD | change)
    data = canonical_json(json.loads(manifest(()).to_bytes()) | {"scores": [GOOD | change]})
    with pytest.raises(RefusedError) as refused:
        from_bytes(Manifest, data, code="update-manifest")
    assert refused.value.code == "update-manifest"


@pytest.mark.parametrize(
    "change",
    [
        {"anatomy": "liver"},
        {"modality": "CT"},
        {"top1": 101, "top5": None},
        {"top1": 90, "top5": 80},
        {"top5": 101},
        {"positives": [[A, 60], [B, 50]]},
        {"positives": [[B, 40], [A, 50]]},
        {"positives": [[A, 20], [A, 30], [B, 40]]},
        {"positives": [[A, 50], [160, 40]]},
        {"hits": [[A, 60]]},
        {"hits": [[C, 20]]},
        {"hits": [[A, 30], [B, 35]]},
        {"hits": [[A, 30]], "top1": "few"},
        {"hits": [[A, 10]], "positives": [[A, 60]]},
        {"cells": [[A, A, 11]]},
        {"cells": [[A, B, 21]]},
        {"cells": [[A, B, 10], [A, C, 11]]},
        {"cells": [[B, A, 11]]},
        {"cells": [[A, 200, 11]]},
        {"auc": [[A, 0.5], [A, 0.6]]},
        {"auc": [[3, 0.5]]},
    ],
)
def test_figures_that_cannot_be(change: dict[str, Any]) -> None:
    assert faults(change) != ""


def test_a_site_speaks_of_its_declared_labels_only() -> None:
    assert faults({}, declared=(A, B)) == ""
    assert "declared" in faults({}, declared=(A,))
    assert "twice" in fault([read(GOOD), read(GOOD)], ROWS)


def test_too_many_cells_in_all() -> None:
    own = [label.index for label in groups()["CT", "abd"]]
    cells = [(true, predicted, 10) for true in own for predicted in own if true != predicted][: MAX_CELLS - 50]
    other = GroupScores(modality="CT", anatomy="abd", images=10**6, top1=10, cells=tuple(cells))
    more = GroupScores(
        modality="MR", anatomy="brain", images=10**6, top1=10, cells=tuple((A, p, 10) for p in range(100) if p != A)
    )
    assert "too many" in fault([other, more], range(165))


@given(st.integers(10, 10**9), st.sampled_from([None, "few", "most"]))
def test_what_a_count_can_be(images: int, word: Any) -> None:
    least, most = interval(word, images)
    assert 0 <= least < most <= images and (most - least == 9 or word is None)
    assert interval(25, images) == (25, 25)
