from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rin.common.errors import StateError
from rin.common.layout import Layout
from rin.common.plan import Strategy
from rin.server.aggregate import Block
from rin.server.strategies import STRATEGIES, advance

LAYOUT = Layout.of(
    [
        ("backbone.bn.running_var", (3,), "buffer"),
        ("backbone.conv.weight", (4,), "parameter"),
        ("head.bias", (2,), "parameter"),
        ("head.weight", (2, 2), "parameter"),
    ]
)
SIZE = LAYOUT.data_bytes // 4
NONE = np.empty(0, np.int64)
PARAMETERS = slice(3, SIZE)


def strategy(name: str, **keys: float) -> Strategy:
    return Strategy.model_validate({"name": name, **{k.replace("_", "-"): v for k, v in keys.items()}})


def blocks(mean: np.ndarray) -> Iterator[Block]:
    for tensor in LAYOUT.tensors:
        for start in range(0, tensor.nbytes // 4, 3):  # several blocks a tensor
            first = tensor.offset // 4 + start
            yield Block(tensor, start, mean[first : min(first + 3, (tensor.offset + tensor.nbytes) // 4)])


def rounds(path: Path, plan: Strategy, means: np.ndarray, frozen: np.ndarray = NONE) -> list[np.ndarray]:
    """The weights before the first and after each round; the state goes through the disk in between."""
    weights, found = np.linspace(0.5, 1.5, SIZE, dtype=np.float32), []
    found.append(weights.copy())
    for i, mean in enumerate(means):
        before = path / f"{i}" if i else None
        advance(weights, blocks(mean), LAYOUT, plan, frozen=frozen, before=before, after=path / f"{i + 1}")
        found.append(weights.copy())
    return found


@pytest.fixture
def means() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, SIZE)) * 0.1


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_fedavg_adds_the_mean(tmp_path: Path, means: np.ndarray, name: str) -> None:
    got = rounds(tmp_path, strategy(name), means)
    for before, after, mean in zip(got, got[1:], means, strict=False):
        np.testing.assert_allclose(after, before + mean, rtol=2e-7, atol=1e-7)


def test_server_learning_rate_scales_parameters_but_not_buffers(tmp_path: Path, means: np.ndarray) -> None:
    before, after = rounds(tmp_path, strategy("fedavg", server_learning_rate=0.5), means[:1])
    np.testing.assert_allclose(after[:3], before[:3] + means[0, :3], rtol=1e-6)
    np.testing.assert_allclose(after[3:], before[3:] + 0.5 * means[0, 3:], rtol=1e-6)


def test_fedavgm_remembers_the_last_mean_across_files(tmp_path: Path, means: np.ndarray) -> None:
    got = rounds(tmp_path, strategy("fedavgm", server_momentum=0.5), means)
    first, second = means[0], means[1] + 0.5 * means[0]
    np.testing.assert_allclose(got[2][3:], got[0][3:] + first[3:] + second[3:], rtol=1e-5)
    np.testing.assert_allclose(got[2][:3], got[0][:3] + means[0, :3] + means[1, :3], rtol=1e-5)


def test_fedadam_is_adam_on_parameters_and_leaves_buffers_to_the_mean(tmp_path: Path, means: np.ndarray) -> None:
    got = rounds(tmp_path, strategy("fedadam", server_learning_rate=0.01), means)
    m = v = np.zeros(SIZE)
    expected = got[0].astype(np.float64)
    for t, mean in enumerate(means, start=1):
        m, v = 0.9 * m + 0.1 * mean, 0.99 * v + 0.01 * mean**2
        step = 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-3)
        expected[PARAMETERS] += step[PARAMETERS]
        expected[:3] += mean[:3]
        np.testing.assert_allclose(got[t], expected, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_going_on_from_disk_is_bit_identical_and_repeatable(tmp_path: Path, means: np.ndarray, name: str) -> None:
    plan = strategy(name, server_learning_rate=0.1)
    whole = rounds(tmp_path, plan, means)
    state = (tmp_path / "3").read_bytes()
    weights = whole[2].copy()
    for _ in range(2):  # the frozen round again, as after a crash
        weights = whole[2].copy()
        advance(weights, blocks(means[2]), LAYOUT, plan, frozen=NONE, before=tmp_path / "2", after=tmp_path / "3")
    assert np.array_equal(weights, whole[3])
    assert (tmp_path / "3").read_bytes() == state


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_frozen_rows_stay_in_spite_of_momentum(tmp_path: Path, means: np.ndarray, name: str) -> None:
    plan = strategy(name, server_learning_rate=0.1)
    weights = np.linspace(0.5, 1.5, SIZE, dtype=np.float32)
    advance(weights, blocks(means[0]), LAYOUT, plan, frozen=NONE, before=None, after=tmp_path / "1")
    before = weights.copy()
    later = means[1].copy()
    later[[8, 11, 12]] = 0  # row 1 of bias and weight is declared by too few sites now
    advance(weights, blocks(later), LAYOUT, plan, frozen=np.array([1]), before=tmp_path / "1", after=tmp_path / "2")
    assert np.array_equal(weights[[8, 11, 12]], before[[8, 11, 12]])
    assert (weights[[7, 9, 10]] != before[[7, 9, 10]]).all()


@pytest.mark.parametrize("damage", ["absent", "torn"])
def test_a_lost_state_is_said(tmp_path: Path, means: np.ndarray, damage: str) -> None:
    if damage == "torn":
        rounds(tmp_path, strategy("fedadam"), means[:1])
        (tmp_path / "torn").write_bytes((tmp_path / "1").read_bytes()[:40])
    weights = np.ones(SIZE, np.float32)
    with pytest.raises(StateError, match="missing or damaged"):
        advance(
            weights,
            blocks(means[0]),
            LAYOUT,
            strategy("fedadam"),
            frozen=NONE,
            before=tmp_path / damage,
            after=tmp_path / "2",
        )
