"""Start: a run begins from the weights that its plan names, and from no others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from rin.common import weights
from rin.common.backbones import BACKBONES, build, initial
from rin.common.errors import ConfigError, StateError
from rin.common.files import write_atomic
from rin.common.formats import read
from rin.common.keylayouts import torchvision_state
from rin.common.layout import file_digest
from rin.common.plan import Model, parse_plan, plan_digest
from rin.server import checkpoints, start
from rin.server.consortium import plan_template
from rin.server.export import export, newest
from rin.server.rundir import RunDir
from tests.simulator import TINY, make, plan_text, stripes

SITES = ["siteA", "siteB", "siteC"]
FACTS = {"backbone": "resnet18", "norm": "batch", "image_size": 32, "normalisation": "symmetric"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "resnet18", TINY)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A checkpoint of rin with its head."""
    network = initial(Model.model_validate({"backbone": "resnet18", "image-size": 32}), 77)
    weights.save(tmp_path / "ours", network, weights.layout_of(network), facts=FACTS)
    return tmp_path / "ours"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    network = initial(Model.model_validate({"backbone": "resnet18", "image-size": 32}), 78)
    torch.save(torchvision_state(network, head=False), tmp_path / "foreign")
    return tmp_path / "foreign"


def test_our_weights_begin_a_run_as_they_are(ours: Path, tmp_path: Path) -> None:
    made = start.prepare(plan_text(SITES), ours)
    assert made.digest == file_digest(ours)
    plan = parse_plan(made.plan)
    assert plan.model.start == made.digest
    run = RunDir(tmp_path / "run")
    start.write(run, made)
    checkpoints.begin(run, plan, plan_digest(made.plan))
    assert checkpoints.digest_of(run, 0) == made.digest == file_digest(run.checkpoint(0))
    assert weights.read_facts(run.checkpoint(0))["start"] == made.digest
    assert weights.read_facts(run.start)["source"] == {"layout": "rin", "file": made.source["file"], "head": "its own"}


def test_a_foreign_backbone_gets_the_head_of_the_plans_seed(foreign: Path, tmp_path: Path) -> None:
    data = plan_text(SITES, training={"seed": 4})
    made = start.prepare(data, foreign, normalisation="symmetric")
    network = initial(parse_plan(data).model, 4)
    assert torch.equal(made.network.head.weight, network.head.weight)
    assert all(torch.equal(v, made.network.backbone.state_dict()[k]) for k, v in read(foreign).backbone.items())
    other = start.prepare(plan_text(SITES, training={"seed": 5}), foreign, normalisation="symmetric")
    assert other.digest != made.digest
    assert start.prepare(made.plan, foreign, normalisation="symmetric").plan == made.plan


def test_weights_that_do_not_fit_the_plan_are_refused(ours: Path, foreign: Path) -> None:
    with pytest.raises(ConfigError, match="trained on inputs normalised as imagenet"):
        start.prepare(plan_text(SITES), foreign)
    with pytest.raises(ConfigError, match="the plan's is a resnet50"):
        start.prepare(plan_text(SITES, model={"backbone": "resnet50"}), ours)
    with pytest.raises(ConfigError, match=f"gives {file_digest(ours)}"):
        start.prepare(plan_text(SITES, model={"start": "00" * 32}), ours)


def test_the_plan_changes_in_one_line_only(ours: Path) -> None:
    digest = "ab" * 32
    template = plan_template()
    new = start.with_start(template, parse_plan(template), digest)
    changed = [(a, b) for a, b in zip(template.splitlines(), new.splitlines(), strict=True) if a != b]
    assert len(changed) == 1
    assert changed[0][1].startswith(f'start = "{digest}"  '.encode().rstrip())
    bare = plan_text(SITES)
    assert len(start.with_start(bare, parse_plan(bare), digest).splitlines()) == len(bare.splitlines()) + 1
    none = bare.replace(b'[model]\nbackbone = "resnet18"\nimage-size = 32\n', b"")
    assert none != bare
    assert parse_plan(start.with_start(none, parse_plan(none), digest)).model.start == digest
    last = none + b'[model]\nbackbone = "resnet18"'
    assert parse_plan(start.with_start(last, parse_plan(last), digest)).model.start == digest
    inline = b'model = { backbone = "resnet18" }\n' + none
    with pytest.raises(ConfigError, match="no plain table"):
        start.with_start(inline, parse_plan(inline), digest)


def test_a_run_without_its_weights_says_so(ours: Path, tmp_path: Path) -> None:
    made = start.prepare(plan_text(SITES), ours)
    run, plan = RunDir(tmp_path / "run"), parse_plan(made.plan)
    with pytest.raises(StateError, match="not in") as caught:
        checkpoints.begin(run, plan, plan_digest(made.plan))
    assert "--weights" in caught.value.step
    other = build(plan.model)
    start.write(run, dataclasses.replace(made, network=other))
    with pytest.raises(StateError, match="not in"):
        checkpoints.begin(run, plan, plan_digest(made.plan))
    write_atomic(run.plan, made.plan)
    start.place(run, ours)
    checkpoints.begin(run, plan, plan_digest(made.plan))
    write_atomic(run.plan, plan_text(SITES))
    with pytest.raises(ConfigError, match="random weights"):
        start.place(run, ours)


def test_sites_train_only_from_the_start_that_they_accepted(ours: Path, tmp_path: Path) -> None:
    made = start.prepare(plan_text(SITES, training={"rounds": 1}), ours)
    images = {site: [stripes((0, 1, 2, 3), 48, seed)] for seed, site in enumerate(SITES)}
    declared = dict.fromkeys(SITES, (0, 1, 2, 3))
    good = make(tmp_path / "good", images, declared, made.plan)
    start.write(good.run, made)
    good.go()
    export(newest(good.run), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"| started from | weights {made.digest}, read from a file in rin layout (SHA-256 {made.source['file']}) |"
        in card
    )
    bad = make(tmp_path / "bad", images, declared, made.plan)
    start.write(bad.run, made)
    layout = checkpoints.begin(bad.run, bad.plan, plan_digest(made.plan))
    swapped = weights.save(bad.run.weights / "part", build(bad.plan.model), layout)
    (bad.run.weights / "part").replace(bad.run.weights_file(swapped))
    facts = weights.read_facts(bad.run.checkpoint(0))
    weights.save(bad.run.checkpoint(0), build(bad.plan.model), layout, facts={**facts, "weights": swapped})
    with pytest.raises(StateError, match="bad-weights"):
        bad.go()
