from pathlib import Path

import numpy as np
import pytest

from rin.common.backbones import BACKBONES, build
from rin.common.errors import StateError
from rin.common.files import read_json
from rin.common.layout import Layout, file_digest
from rin.common.plan import Plan, parse_plan, plan_digest
from rin.common.weights import layout_of, read_facts, read_into
from rin.server import checkpoints
from rin.server.rundir import RunDir
from tests.simulator import TINY, plan_text


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "resnet18", TINY)


@pytest.fixture
def begun(tmp_path: Path) -> tuple[RunDir, Plan, str, Layout]:
    data = plan_text(["siteA", "siteB", "siteC"])
    run, plan, digest = RunDir(tmp_path), parse_plan(data), plan_digest(data)
    return run, plan, digest, checkpoints.begin(run, plan, digest)


def test_the_start_is_a_function_of_the_seed(begun: tuple[RunDir, Plan, str, Layout], tmp_path: Path) -> None:
    run, plan, digest, layout = begun
    start = checkpoints.digest_of(run, 0)
    assert file_digest(run.checkpoint(0)) == file_digest(run.weights_file(start)) == start
    assert [path.name for path in run.weights.iterdir()] == [f"{start}.safetensors"]
    assert Layout.from_json(read_json(run.layout)) == layout == layout_of(build(plan.model))
    layout.check(run.weights_file(start), start)
    other = RunDir(tmp_path / "other")
    checkpoints.begin(other, plan, digest)
    assert other.checkpoint(0).read_bytes() == run.checkpoint(0).read_bytes()
    seeded = parse_plan(plan_text(["siteA", "siteB", "siteC"], training={"seed": 1}))
    third = RunDir(tmp_path / "third")
    checkpoints.begin(third, seeded, "00" * 32)
    assert checkpoints.digest_of(third, 0) != start


def test_beginning_again_changes_nothing_and_another_plan_is_refused(begun: tuple[RunDir, Plan, str, Layout]) -> None:
    run, plan, digest, layout = begun
    before = run.checkpoint(0).stat().st_mtime_ns
    assert checkpoints.begin(run, plan, digest) == layout
    assert run.checkpoint(0).stat().st_mtime_ns == before
    with pytest.raises(StateError, match="edited"):
        checkpoints.begin(run, plan, "11" * 32)


def test_a_round_is_published_twice_with_what_it_is(begun: tuple[RunDir, Plan, str, Layout]) -> None:
    run, plan, digest, layout = begun
    start = checkpoints.digest_of(run, 0)
    flat = checkpoints.read_flat(run.weights_file(start), layout, start)
    flat += 1
    facts = checkpoints.facts_of(plan, plan_digest=digest, round=1, updates={"siteA": "ab" * 32})
    new = checkpoints.write_round(run, 1, flat, layout, facts)
    first = run.checkpoint(1).read_bytes()
    assert checkpoints.write_round(run, 1, flat, layout, facts) == new
    assert run.checkpoint(1).read_bytes() == first
    layout.check(run.weights_file(new), new)
    said = read_facts(run.checkpoint(1))
    assert said["weights"] == new
    assert (said["round"], said["plan"], said["label_set"]) == (1, digest, plan.label_set)
    assert (said["backbone"], said["norm"], said["image_size"]) == ("resnet18", "batch", 32)
    assert (said["normalisation"], said["mean"], said["deviation"]) == ("symmetric", [0.5] * 3, [0.5] * 3)
    assert said["updates"] == {"siteA": "ab" * 32}
    assert "without differential privacy" in said["privacy"]
    assert said["release"]
    network = build(plan.model)
    read_into(network, run.checkpoint(1))
    assert np.array_equal(network.head.bias.detach().numpy(), flat[-len(network.head.weight.flatten()) - 165 :][:165])


def test_damaged_weights_are_said(begun: tuple[RunDir, Plan, str, Layout]) -> None:
    run, _, _, layout = begun
    start = checkpoints.digest_of(run, 0)
    path = run.weights_file(start)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StateError, match="damaged"):
        checkpoints.read_flat(path, layout, start)
    path.unlink()
    with pytest.raises(StateError, match="missing"):
        checkpoints.read_flat(path, layout, start)


def test_prune_keeps_the_start_the_last_and_some_before(begun: tuple[RunDir, Plan, str, Layout]) -> None:
    run, plan, digest, layout = begun
    start = checkpoints.digest_of(run, 0)
    flat = checkpoints.read_flat(run.weights_file(start), layout, start)
    new = start
    for number in range(1, 7):
        flat += 1
        facts = checkpoints.facts_of(plan, plan_digest=digest, round=number, updates={})
        new = checkpoints.write_round(run, number, flat, layout, facts)
    checkpoints.prune(run, 6, keep=2)
    assert sorted(int(p.stem[-4:]) for p in run.checkpoints.iterdir()) == [0, 4, 5, 6]
    assert [p.name for p in run.weights.iterdir()] == [f"{new}.safetensors"]
