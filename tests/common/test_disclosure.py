"""What is sent of a confusion table: exact where it is sent, and never enough to solve for a small cell."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from rin.common.disclosure import Outcomes, published
from rin.common.labels import label_set
from rin.common.scores import SMALLEST_CELL, GroupScores, fault, groups

ALL = frozenset({"validation", "confusion", "auc"})
THYROID = tuple(label.index for label in groups()["US", "usthyroid"])
BRAIN = tuple(label.index for label in groups()["MR", "brain"])
PLACES = (0, 2, 7)  # a hit, among the first five, beyond

Cell = tuple[int, int, int]  # true row, predicted row, place


def outcomes(cells: dict[Cell, int], rows: tuple[int, ...], *, each: int = 1) -> Outcomes:
    """Images of one label, `each` of them a patient."""
    images = [cell for cell, count in sorted(cells.items()) for _ in range(count)]
    labels = np.zeros((len(images), len(label_set())), bool)
    for i, (true, _, _) in enumerate(images):
        labels[i, true] = True
    predicted = np.array([cell[1] for cell in images], np.int64)
    place = np.array([cell[2] for cell in images], np.int64)
    return Outcomes(labels, predicted, place, np.arange(len(images), dtype=np.int64) // each, rows)


def one(cells: dict[Cell, int], rows: tuple[int, ...], **options: Any) -> GroupScores:
    (group,) = published(outcomes(cells, rows, **options), {}, ALL)
    return group


def atoms(rows: tuple[int, ...], own: tuple[int, ...]) -> Iterator[Cell]:
    """Every kind of image of a group that there can be, as whoever knows the declared rows would list them."""
    for true, predicted, place in product(own, rows, PLACES):
        if (true == predicted) == (place == 0) and (place < 5 or len(rows) > 5):
            yield true, predicted, place


def sums(group: GroupScores, kinds: list[Cell]) -> tuple[np.ndarray, np.ndarray]:
    """What is sent, as equations over the numbers of images of each kind."""
    rows, values = [], []

    def add(value: int | str | None, chosen: Any) -> None:
        if isinstance(value, int):
            rows.append([float(chosen(*kind)) for kind in kinds])
            values.append(float(value))

    add(group.images, lambda t, p, k: True)
    add(group.top1, lambda t, p, k: k == 0)
    add(group.top5, lambda t, p, k: k < 5)
    for row, count in group.hits:
        add(count, lambda t, p, k, row=row: t == row and k == 0)
    for row, count in group.positives:
        add(count, lambda t, p, k, row=row: t == row)
    for true, predicted, count in group.cells:
        add(count, lambda t, p, k, true=true, predicted=predicted: (t, p) == (true, predicted))
    return np.array(rows), np.array(values)


def questions(kinds: list[Cell], own: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Sets of images that someone may ask about: each kind, and the natural unions of kinds."""
    yield from np.eye(len(kinds))
    tests: list[Any] = [lambda t, p, k: k == 0, lambda t, p, k: k > 0, lambda t, p, k: 0 < k < 5, lambda t, p, k: k > 5]
    for row in own:
        tests.append(lambda t, p, k, row=row: t == row)
        tests.append(lambda t, p, k, row=row: t == row and k == 0)
        tests.append(lambda t, p, k, row=row: t == row and k > 0)
        tests += [lambda t, p, k, row=row, other=other: (t, p) == (row, other) and k > 0 for other in own]
    for test in tests:
        found = np.array([float(test(*kind)) for kind in kinds])
        if found.any():
            yield found


def cells_of(rows: tuple[int, ...], own: tuple[int, ...]) -> st.SearchStrategy[dict[Cell, int]]:
    """Any table; often one in which hardly anything is in some rows or places, so that their sums are small too."""
    size = st.one_of(st.just(0), st.integers(0, 14), st.integers(8, 60))
    kinds = list(atoms(rows, own))
    thin = st.tuples(st.sets(st.sampled_from(own), max_size=2), st.sets(st.sampled_from(PLACES), max_size=1))

    def thinned(
        drawn: dict[Cell, int], empty: tuple[set[int], set[int]], left: list[tuple[Cell, int]]
    ) -> dict[Cell, int]:
        kept = {kind: 0 if kind[0] in empty[0] or kind[2] in empty[1] else n for kind, n in drawn.items()}
        return kept | dict(left)

    few = st.lists(st.tuples(st.sampled_from(kinds), st.integers(1, 6)), max_size=4)
    return st.builds(thinned, st.fixed_dictionaries(dict.fromkeys(kinds, size)), thin, few)


@pytest.mark.parametrize(
    ("rows", "own"),
    [(THYROID, THYROID), (BRAIN[:3], BRAIN[:3]), (BRAIN[:6], BRAIN[:6]), ((*BRAIN[:4], *THYROID), BRAIN[:4])],
)
@given(data=st.data())
@settings(max_examples=40, deadline=None)  # linear programs
def test_no_small_cell_can_be_solved(rows: tuple[int, ...], own: tuple[int, ...], data: st.DataObject) -> None:
    cells = data.draw(cells_of(rows, own))
    kinds = list(atoms(rows, own))
    images = outcomes(cells, rows)
    for group in published(images, {}, ALL):
        matrix, values = sums(group, kinds)
        truth = np.array([cells[kind] for kind in kinds], float)
        assert (matrix @ truth == values).all()  # what is sent is exact
        inverse = np.linalg.pinv(matrix)
        small = [asked for asked in questions(kinds, own) if not _large(asked, kinds, images)]
        for question in small:
            assert np.abs(question @ inverse @ matrix - question).max() > 1e-6, "it follows by adding and subtracting"
        for question in data.draw(st.permutations(small))[:8]:
            least, most = _range(question, matrix, values, *bounds(group, kinds))
            assert most - least >= 1, "it follows because no count is negative"


def _large(asked: np.ndarray, kinds: list[Cell], images: Outcomes) -> bool:
    """Whether the set holds enough patients, so that anybody may know its size."""
    chosen = {kind for kind, one in zip(kinds, asked, strict=True) if one}
    mask = [kind in chosen for kind in _kinds_of(images)]
    return len(np.unique(images.patient[mask])) >= SMALLEST_CELL


def _kinds_of(images: Outcomes) -> list[Cell]:
    true = images.labels.argmax(1)
    return list(zip(true.tolist(), images.predicted.tolist(), images.place.tolist(), strict=True))


def bounds(group: GroupScores, kinds: list[Cell]) -> tuple[np.ndarray, np.ndarray]:
    """What follows from the words: sums that are at most nine."""
    rows = [[0.0] * len(kinds)]
    for word, chosen in ((group.top1, lambda k: k == 0), (group.top5, lambda k: k < 5)):
        if isinstance(word, str):
            rows.append([float(chosen(place) == (word == "few")) for _, _, place in kinds])
    for row, word in group.hits:
        if isinstance(word, str):
            rows.append([float(true == row and (place == 0) == (word == "few")) for true, _, place in kinds])
    return np.array(rows), np.full(len(rows), 9.0)


def _range(
    question: np.ndarray, matrix: np.ndarray, values: np.ndarray, above: np.ndarray, most: np.ndarray
) -> tuple[float, float]:
    """The least and the most that the set can hold, given what is sent and that no count is negative."""
    ends = []
    for sign in (1.0, -1.0):
        found = linprog(sign * question, A_eq=matrix, b_eq=values, A_ub=above, b_ub=most)
        assert found.status == 0, found.message
        ends.append(sign * found.fun)
    return ends[0], ends[1]


def test_large_cells_are_all_sent() -> None:
    a, b = THYROID
    group = one({(a, a, 0): 40, (a, b, 1): 12, (b, b, 0): 30, (b, a, 1): 11}, THYROID)
    assert group == GroupScores(
        modality="US",
        anatomy="usthyroid",
        images=93,
        top1=70,
        top5=93,
        positives=((a, 52), (b, 41)),
        hits=((a, 40), (b, 30)),
        cells=((a, b, 12), (b, a, 11)),
    )


def test_a_network_that_is_almost_always_right_says_only_how_many_images_there_are() -> None:
    a, b = THYROID
    group = one({(a, a, 0): 400, (a, b, 1): 4, (b, b, 0): 300, (b, a, 1): 5}, THYROID)
    assert (group.images, group.top1, group.top5) == (709, "most", 709)
    assert (group.positives, group.hits, group.cells) == (((a, 404), (b, 305)), (), ())
    assert one({(a, a, 0): 400, (b, b, 0): 300}, THYROID).top1 == "most"  # all but none is not told from all but few
    assert one({(a, b, 1): 400, (b, b, 0): 1}, THYROID) == one({(a, b, 1): 401}, THYROID)


def test_a_second_cell_is_withheld_beside_a_small_one() -> None:
    a, b, c = BRAIN[:3]
    cells = {(a, a, 0): 50, (a, b, 1): 20, (b, b, 0): 50, (b, c, 1): 12, (c, c, 0): 50, (c, a, 1): 3}
    group = one(cells, (a, b, c))
    assert (group.images, group.top1) == (185, 150)
    assert group.positives == ((a, 70), (b, 62), (c, 53))
    assert group.hits == ((a, 50), (c, "most"))  # with those of b, the three misses of c would follow
    assert group.cells == ()  # 20 of 20: that nobody was taken for c would follow


def test_no_word_where_it_would_give_a_number_away() -> None:
    a, b = THYROID
    cells = {(a, a, 0): 9, (a, b, 1): 50, (b, b, 0): 8, (b, a, 1): 50}
    assert one(cells, THYROID).hits == ((a, "few"), (b, "few"))
    group = one(cells | {(b, b, 0): 9}, THYROID)
    assert (group.top1, group.hits) == (18, ())  # two times nine at most


def test_cells_are_counted_in_patients() -> None:
    a, b = THYROID
    cells = {(a, a, 0): 40, (a, b, 1): 18, (b, b, 0): 40, (b, a, 1): 30}
    assert one(cells, THYROID, each=1).hits == ((a, 40), (b, 40))
    assert one(cells, THYROID, each=2).hits == ()  # nine patients
    assert published(outcomes(cells, THYROID, each=20), {}, ALL) == ()


def test_top5_without_top1_early_in_training() -> None:
    rows = BRAIN[:6]
    a, b = rows[:2]
    group = one({(a, a, 0): 4, (a, b, 2): 50, (a, b, 7): 50}, rows)
    assert (group.images, group.top1, group.top5, group.hits) == (104, "few", 54, ())
    assert group.positives == ()  # that of 104 all are of one label would say that the others have none


def test_an_image_of_two_labels_counts_once_in_its_group() -> None:
    a, b, c = BRAIN[:3]
    labels = np.zeros((30, len(label_set())), bool)
    labels[:, [a, b]] = True
    predicted = np.repeat([b, c], 15)
    place = np.repeat([0, 2], 15)
    images = Outcomes(labels, predicted, place, np.arange(30), (a, b, c))
    (group,) = published(images, {}, ALL)
    assert (group.images, group.top1) == (30, 15)
    assert (group.positives, group.hits) == (
        ((a, 15),),
        ((a, "few"),),
    )  # those of b go with those of c, of which there are none


def test_only_what_both_sides_allow() -> None:
    a, b = THYROID
    images = outcomes({(a, a, 0): 40, (a, b, 1): 12, (b, b, 0): 30, (b, a, 1): 11}, THYROID)
    areas = {a: 0.91234567, b: 0.5}
    assert published(images, areas, frozenset({"confusion", "auc"})) == ()
    (group,) = published(images, areas, frozenset({"validation"}))
    assert group.cells == () and group.auc == () and group.hits
    (group,) = published(images, areas, ALL)
    assert group.auc == ((a, 0.9123), (b, 0.5))


def test_an_auc_over_few_patients_is_left_out() -> None:
    a, b = THYROID
    images = outcomes({(a, a, 0): 40, (b, b, 0): 12}, THYROID, each=2)
    (group,) = published(images, {a: 0.9, b: 0.9}, ALL)
    assert group.auc == ()


def test_large_counts_are_rounded_and_still_add_up() -> None:
    a, b = THYROID
    cells = {(a, a, 0): 12344, (a, b, 1): 10005, (b, b, 0): 33336, (b, a, 1): 20015}
    group = one(cells, THYROID)
    assert group.images == 75700 and dict(group.hits) == {a: 12340, b: 33340}
    assert fault([group], THYROID) == ""


def test_the_largest_confusion_cells_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rin.common.disclosure.MAX_CELLS", 2)
    a, b, c = BRAIN[:3]
    cells = {(row, row, 0): 50 for row in (a, b, c)}
    cells |= {(a, b, 1): 20, (a, c, 1): 30, (b, a, 1): 25, (b, c, 1): 21, (c, a, 1): 22, (c, b, 1): 19}
    assert one(cells, (a, b, c)).cells == ((a, c, 30), (b, a, 25))
