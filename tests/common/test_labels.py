from __future__ import annotations

import hashlib

from rin.common.labels import label_index, label_set, label_set_digest


def test_the_165_labels_are_in_code_point_order() -> None:
    names = [label.name for label in label_set()]
    assert len(names) == len(set(names)) == 165 and names == sorted(names)
    assert [label.index for label in label_set()] == list(range(165))
    assert label_index()[names[100]] == 100


def test_a_name_is_modality_anatomy_finding() -> None:
    for label in label_set():
        assert label.name == f"{label.modality}_{label.anatomy}_{label.finding}"
        assert label.modality in ("CT", "MR", "US")


def test_the_digest_is_over_the_names() -> None:
    names = "\n".join(label.name for label in label_set())
    assert label_set_digest() == hashlib.sha256(names.encode()).hexdigest()
    assert label_set_digest() == "23e09f5cd251017b48747ed3c5b9be3baaef286ac6eed3abfa678840d263fa29"
