from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from rin.common.errors import ConfigError
from rin.common.labels import label_set_digest
from rin.common.plan import Model, parse_plan, plan_digest, read_plan

PLAN = f"""
protocol = 1
name = "small"
label-set = "{label_set_digest()}"
[sites]
siteA = 1.0
siteB = 2
siteC = 0.5
[training]
rounds = 3
local-steps = 5
batch-size = 8
"""


def fault(text: str) -> str:
    with pytest.raises(ConfigError) as failed:
        parse_plan(text.encode())
    return failed.value.message


def test_a_short_plan_has_the_strict_defaults() -> None:
    plan = parse_plan(PLAN.encode())
    assert plan.sites == {"siteA": 1.0, "siteB": 2.0, "siteC": 0.5}
    assert (plan.limits.min_sites, plan.limits.quorum) == (3, 3)
    assert plan.privacy.mode == "none" and plan.retention.receipts == "delete"


@pytest.mark.parametrize(
    "old,new,words",
    [
        ("protocol = 1", "protocol = 2", "plan.toml: protocol: want 1, got 2"),
        (label_set_digest(), "0" * 64, "label-set"),
        ("siteB = 2", "sitea = 2", "differ in more than their case"),
        ("siteB = 2", '"site B" = 2', "sites"),
        ("siteB = 2", "siteB = 0", "sites.siteB: want greater than 0, got 0"),
        ("siteB = 2", "siteB = nan", "sites.siteB"),
        ("siteB = 2\nsiteC = 0.5", "", "limits.quorum: 3 of 1 sites can never be reached"),
        ("rounds = 3", "rounds = 0", "training.rounds"),
        ("rounds = 3", "rounds = 3\nround = 4", "unknown key 'training.round'"),
        ("rounds = 3", 'rounds = 3\noptimizer = "lion"', "training.optimizer"),
        ("[training]", "[limits]\nmin-sites = 4\nquorum = 3\n[training]", "must be at least limits.min-sites"),
        ("[training]", '[privacy]\nmode = "dp"\n[training]', "privacy.mode"),
        ("rounds = 3", "rounds = 3\nema = 1.0", "training.ema: want less than 1, got 1.0"),
        ("rounds = 3", 'rounds = 3\nsampling = "balanced"\nlogit-adjustment = 1.0', "choose one of them"),
        ("[training]", '[augment]\nflip = "left"\n[training]', "augment.flip"),
        (
            "[training]",
            '[model]\ntarget = "multi"\n[training]\nlogit-adjustment = 1.0',
            'needs model.target = "single"',
        ),
        ("[training]", '[model]\nbackbone = "vit"\n[training]', "model.backbone: want 'resnet18', 'resnet50'"),
        ("[training]", '[model]\nnorm = "layer"\n[training]', "model.norm: want 'batch' or 'group'"),
        ("[training]", "[model]\nimage-size = 31\n[training]", "model.image-size: want greater than or equal to 32"),
        ("rounds = 3", 'rounds = 3\nfreeze = "all"', "training.freeze: want 'none', 'head' or 'top10', got 'all'"),
        ('name = "small"', 'name = "<b>"', "name"),
        ('name = "small"', 'name = "small"\nmetrics = ["accuracy"]', "metrics.0"),
        ('name = "small"', 'name = "small"\nmetrics = ["auc", "loss"]', "come with validation only"),
    ],
)
def test_what_a_plan_may_not_say(old: str, new: str, words: str) -> None:
    assert old in PLAN and words in fault(PLAN.replace(old, new))


@pytest.mark.parametrize(
    ("keys", "size"),
    [
        ("", 224),
        ('backbone = "inception_v3"', 299),
        ('backbone = "swin_t"', 224),
        ('backbone = "inception_resnet_v2"\nimage-size = 224', 224),
        ('backbone = "inception_v3"\nimage-size = 75', 75),
        ('backbone = "densenet121"\nnorm = "group"\nimage-size = 32', 32),
    ],
)
def test_the_image_size_is_the_backbones_own_unless_said(keys: str, size: int) -> None:
    assert parse_plan(f"{PLAN}[model]\n{keys}\n".encode()).model.image_size == size
    assert Model().image_size == 224


def test_a_size_that_the_backbone_cannot_take() -> None:
    keys = '[model]\nbackbone = "inception_v3"\nimage-size = 64\n'
    assert fault(PLAN + keys) == "plan.toml: model.image-size: want at least 75 pixels for inception_v3, got 64"
    text = fault(PLAN + keys.replace("inception_v3", "vgg"))
    assert "model.backbone" in text and "image-size" not in text


def test_no_site_at_all() -> None:
    sites = PLAN[PLAN.index("siteA") : PLAN.index("[training]")]
    assert "name at least one site" in fault(PLAN.replace(sites, ""))


def test_the_digest_is_over_the_files_bytes(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    plan, data = read_plan(path)
    assert plan == parse_plan(data) and plan_digest(data) == hashlib.sha256(PLAN.encode()).hexdigest()
    assert plan_digest(data + b"\n") != plan_digest(data)
    with pytest.raises(ConfigError, match="missing"):
        read_plan(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_plan(tmp_path)
    with pytest.raises(ConfigError, match="not UTF-8"):
        parse_plan(b"\xff")
