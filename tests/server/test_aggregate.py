import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rin.common.errors import RefusedError
from rin.common.layout import Layout, file_digest
from rin.common.weights import write_tensors
from rin.server.aggregate import Contribution, clip_scale, frozen_rows, inspect, mean_update, shares

LAYOUT = Layout.of(
    [
        ("backbone.bn.running_var", (5,), "buffer"),
        ("backbone.conv.weight", (3, 4, 2), "parameter"),
        ("head.bias", (4,), "parameter"),
        ("head.weight", (4, 3), "parameter"),
    ]
)
SIZE = LAYOUT.data_bytes // 4
HEAD = slice(29, SIZE)  # bias, then weight


def write(path: Path, flat: np.ndarray, layout: Layout = LAYOUT) -> str:
    values = flat.astype(np.float32)
    return write_tensors(
        path, layout, (values[t.offset // 4 : (t.offset + t.nbytes) // 4].reshape(t.shape) for t in layout.tensors)
    )


def updates(
    tmp_path: Path, labels: Sequence[set[int]], scales: Sequence[float] = ()
) -> tuple[list[Contribution], np.ndarray]:
    rng = np.random.default_rng(0)
    flats = rng.normal(size=(len(labels), SIZE)).astype(np.float32)
    found = []
    for i, own in enumerate(labels):
        path = tmp_path / f"{i}"
        write(path, flats[i])
        found.append(Contribution(f"site{i}", path, 1.0 + i, own, (scales or [1.0] * len(labels))[i]))
    return found, flats


def mean(found: list[Contribution], *, max_share: float = 1.0, min_sites: int = 1) -> np.ndarray:
    blocks = list(mean_update(found, LAYOUT, max_share=max_share, min_sites=min_sites))
    assert [b.tensor.offset // 4 + b.start for b in blocks] == [0, 5, 29, 33]
    return np.concatenate([b.mean for b in blocks])


def test_weighted_mean_is_exact_in_float64(tmp_path: Path) -> None:
    found, flats = updates(tmp_path, [{0, 1, 2, 3}] * 3)
    expected = np.zeros(SIZE)
    for share, flat in zip((1 / 6, 2 / 6, 3 / 6), flats, strict=True):
        expected += share * flat.astype(np.float64)
    np.testing.assert_allclose(mean(found), expected, rtol=1e-15, atol=1e-16)
    assert np.array_equal(mean(found), mean(found[::-1]))  # the order is the names', not the arrivals'


def test_head_rows_are_averaged_over_the_sites_that_declare_them(tmp_path: Path) -> None:
    found, flats = updates(tmp_path, [{0, 1}, {1, 2}, {1}])
    got = mean(found, min_sites=1)
    bias, weight = got[29:33], got[33:].reshape(4, 3)
    f = flats.astype(np.float64)
    assert bias[0] == pytest.approx(f[0, 29])
    assert bias[1] == pytest.approx((f[0, 30] + 2 * f[1, 30] + 3 * f[2, 30]) / 6)
    assert weight[2] == pytest.approx(f[1, 33:].reshape(4, 3)[2])
    assert weight[3].tolist() == [0, 0, 0]
    assert frozen_rows(found, 4, 1).tolist() == [3]


def test_head_rows_of_too_few_sites_do_not_move(tmp_path: Path) -> None:
    found, _ = updates(tmp_path, [{0, 1}, {1, 2}, {1}])
    got = mean(found, min_sites=3)
    assert got[29:33].tolist()[0] == got[29:33].tolist()[2] == 0
    assert got[30] != 0
    assert np.abs(got[33:].reshape(4, 3)[[0, 2, 3]]).max() == 0
    assert np.abs(got[:29]).min() > 0
    assert frozen_rows(found, 4, 3).tolist() == [0, 2, 3]


def test_share_of_one_site_is_capped_in_backbone_and_rows(tmp_path: Path) -> None:
    found, flats = updates(tmp_path, [{0}, {1}, {0, 1}])
    got = mean(found, max_share=0.4)
    f = flats.astype(np.float64)
    assert got[5] == pytest.approx(0.2 * f[0, 5] + 0.4 * f[1, 5] + 0.4 * f[2, 5])
    assert got[29] == pytest.approx(0.5 * f[0, 29] + 0.5 * f[2, 29])


@given(
    weights=st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.floats(1e-3, 1e3), min_size=1, max_size=12),
    cap=st.floats(0.01, 1.0),
)
def test_shares_sum_to_one_and_keep_cap_and_order(weights: dict[str, float], cap: float) -> None:
    found = shares(weights, cap)
    assert list(found) == sorted(weights)
    assert sum(found.values()) == pytest.approx(1)
    assert max(found.values()) <= max(cap, 1 / len(weights)) * (1 + 1e-9)
    for a in weights:
        for b in weights:
            if weights[a] <= weights[b]:
                assert found[a] <= found[b] * (1 + 1e-9)


def test_shares_without_need_of_the_cap_are_the_weights() -> None:
    assert shares({"b": 3.0, "a": 1.0}, 0.8) == {"a": 0.25, "b": 0.75}
    assert shares({"a": 1.0, "b": 8.0, "c": 1.0}, 0.6) == pytest.approx({"a": 0.2, "b": 0.6, "c": 0.2})


def test_clipping_scales_the_whole_update(tmp_path: Path) -> None:
    found, flats = updates(tmp_path, [{0, 1, 2, 3}] * 2, scales=[0.5, 1.0])
    f = flats.astype(np.float64)
    np.testing.assert_allclose(mean(found), f[0] / 6 + 2 * f[1] / 3)
    assert clip_scale(5.0, 10.0) == 1.0
    assert clip_scale(20.0, 10.0) == 0.5


def test_inspect_measures_parameters_only(tmp_path: Path) -> None:
    flat = np.random.default_rng(1).normal(size=SIZE)
    digest = write(tmp_path / "u", flat)
    found = inspect(tmp_path / "u", LAYOUT)
    assert found.digest == digest == file_digest(tmp_path / "u")
    assert found.norm == pytest.approx(float(np.linalg.norm(flat.astype(np.float32).astype(np.float64)[5:])))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 7, SIZE - 1])
def test_inspect_refuses_what_is_not_finite(tmp_path: Path, value: float, place: int) -> None:
    flat = np.zeros(SIZE)
    flat[place] = value
    write(tmp_path / "u", flat)
    with pytest.raises(RefusedError) as caught:
        inspect(tmp_path / "u", LAYOUT)
    assert caught.value.code == "update-not-finite"


def test_huge_but_finite_values_do_not_overflow(tmp_path: Path) -> None:
    write(tmp_path / "u", np.full(SIZE, 3e38))
    assert inspect(tmp_path / "u", LAYOUT).norm == pytest.approx(3e38 * np.sqrt(SIZE - 5), rel=1e-6)


def test_a_short_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "u", np.zeros(SIZE))
    (tmp_path / "u").write_bytes((tmp_path / "u").read_bytes()[:-4])
    with pytest.raises(RefusedError) as caught:
        inspect(tmp_path / "u", LAYOUT)
    assert caught.value.code == "update-length"


MEMORY = """
import resource, sys
from pathlib import Path
from rin.common.layout import Layout
from rin.server.aggregate import Contribution, mean_update
root, n, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
layout = Layout.of([("w", (size,), "parameter")])
all_of_it = [Contribution(f"s{i}", root / f"{i}", 1.0, (), 1.0) for i in range(n)]
sum(float(b.mean[0]) for b in mean_update(all_of_it, layout, max_share=1.0, min_sites=1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_is_flat_in_the_number_of_sites(tmp_path: Path) -> None:
    size = 5_000_000  # 20 MB an update: seven more would be 140 MB
    layout = Layout.of([("w", (size,), "parameter")])
    for i in range(10):
        write(tmp_path / f"{i}", np.full(size, float(i)), layout)

    def peak(n: int) -> int:
        command = [sys.executable, "-c", MEMORY, str(tmp_path), str(n), str(size)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # KiB

    few, many = peak(3), peak(10)
    assert many - few < 10_000, (few, many)
