from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from rin.common.errors import RefusedError
from rin.common.layout import Layout, data_offset, file_digest

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)
TENSORS = st.dictionaries(NAMES, SHAPES, min_size=1, max_size=6)


@given(TENSORS)
def test_the_header_is_the_one_that_safetensors_writes(shapes: dict[str, tuple[int, ...]]) -> None:
    layout = Layout.of((name, shape, "parameter") for name, shape in shapes.items())
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    written = save(tensors)
    assert written[: data_offset(written)] == layout.header()
    assert len(written) == layout.file_bytes


@given(TENSORS, st.randoms())
def test_a_layout_does_not_depend_on_the_order_it_came_in(shapes: dict, rng: object) -> None:
    rows = [(name, shape, "buffer") for name, shape in shapes.items()]
    rng.shuffle(rows)  # type: ignore[attr-defined]
    assert Layout.of(rows) == Layout.of(reversed(rows)) == Layout.from_json(Layout.of(rows).to_json())
    assert Layout.from_json(json.loads(json.dumps(Layout.of(rows).to_json()))) == Layout.of(rows)


LAYOUT = Layout.of([("b", (3,), "buffer"), ("a", (2, 5), "parameter"), ("c", (), "parameter")])


def weights(path: Path) -> tuple[bytes, str]:
    data = bytes(range(LAYOUT.data_bytes))
    path.write_bytes(LAYOUT.header() + data)
    return LAYOUT.header() + data, hashlib.sha256(data).hexdigest()


def test_safetensors_reads_what_the_layout_describes(tmp_path: Path) -> None:
    content, digest = weights(tmp_path / "w")
    found = load(content)
    assert {name: array.shape for name, array in found.items()} == {"a": (2, 5), "b": (3,), "c": ()}
    assert found["b"].tobytes() == content[-16:-4]  # a is 40 bytes, b 12, c 4
    assert file_digest(tmp_path / "w") == digest
    LAYOUT.check(tmp_path / "w", digest)


def test_what_does_not_fit_is_refused_with_its_reason(tmp_path: Path) -> None:
    content, digest = weights(tmp_path / "w")
    longer = LAYOUT.header().replace(b'"F32"', b'"I32"', 1) + content[len(LAYOUT.header()) :]
    wrong = {
        "update-length": content + b"x",
        "update-header": longer,
        "bad-weights": content[:-1] + b"\x00",
    }
    for code, data in wrong.items():
        (tmp_path / "w").write_bytes(data)
        with pytest.raises(RefusedError) as refused:
            LAYOUT.check(tmp_path / "w", digest)
        assert refused.value.code == code
    (tmp_path / "w").write_bytes(b"")
    with pytest.raises(RefusedError):
        LAYOUT.check(tmp_path / "w", digest)
