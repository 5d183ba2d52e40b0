"""A site's figures on its held-out patients: only where both sides want them, and the network stays as it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rin.client.home import Home
from rin.client.site import Site, read_site
from rin.client.validation import measure
from rin.common.backbones import BACKBONES, Network, initial
from rin.common.errors import RefusedError
from rin.common.plan import Plan, parse_plan
from rin.common.scores import groups
from tests.simulator import TINY, Images, make_home, plan_text, stripes

ROWS = tuple(label.index for label in groups()["MR", "brain"])[:2]
Measured = tuple[Home, Network, Plan, Site]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    monkeypatch.setitem(BACKBONES, "resnet18", TINY)
    return made(tmp_path)


def made(folder: Path, *, figures: str = '"validation", "auc"', extra: str = "", held: int = 80) -> Measured:
    text = plan_text(["siteA", "siteB", "siteC"]).replace(b"[sites]", b'metrics = ["validation", "auc"]\n[sites]')
    home, plan, images = Home(folder / "siteA"), parse_plan(text), stripes(ROWS, held, 1)
    make_home(home, "siteA", [stripes(ROWS, 40, 0), Images(images.pixels, images.labels, "val")], ROWS, text)
    written = home.site_toml.read_text().replace('"loss", "top1", "top5", "images"', figures) + extra
    home.site_toml.write_text(written)
    return home, initial(plan.model, 0), plan, read_site(home)


def never() -> str:
    return ""


def test_both_sides_must_allow_it(site: Measured, tmp_path: Path) -> None:
    (group,) = measure(*site, never)
    assert (group.modality, group.anatomy, group.images) == ("MR", "brain", 80)
    assert [row for row, _ in group.auc] == list(ROWS)
    assert group.cells == ()
    home, network, plan, _ = site
    silent = plan.model_copy(update={"metrics": ("loss",)})
    assert measure(home, network, silent, read_site(home), never) == ()
    assert measure(*made(tmp_path / "b", figures='"loss", "auc"'), never) == ()


def test_what_is_not_held_out_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "resnet18", TINY)
    assert measure(*made(tmp_path / "a", extra="[archive]\nhold-out = false\n"), never) == ()
    assert measure(*made(tmp_path / "b", held=0), never) == ()
    assert measure(*made(tmp_path / "c", held=18), never) == ()  # nine patients


def test_nothing_is_measured_in_private_training(site: Measured) -> None:
    home, network, plan, facts = site
    private: Any = plan.model_copy(update={"privacy": SimpleNamespace(mode="dp")})
    assert measure(home, network, private, facts, never) == ()
    assert private.last_round == plan.training.rounds == plan.last_round - 1


def test_weights_statistics_and_modes_stay(site: Measured) -> None:
    home, network, plan, facts = site
    network.train()
    next(iter(network.modules())).get_submodule("backbone.bn1").eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [part.training for part in network.modules()]
    measure(home, network, plan, facts, never)
    assert [part.training for part in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("code", ["cancelled", "deadline"])
def test_it_ends_within_a_batch(site: Measured, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home, network, plan, facts = site
    seen = []
    network.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with pytest.raises(RefusedError) as caught:
        measure(home, network, plan, facts, lambda: code if len(seen) == 2 else "")
    assert caught.value.code == code
    assert len(seen) == 2 and max(seen) <= plan.training.batch_size


def test_too_little_memory_is_a_refusal(site: Measured) -> None:
    home, network, plan, facts = site

    def full(*args: object) -> None:
        raise MemoryError

    network.register_forward_hook(full)
    with pytest.raises(RefusedError) as caught:
        measure(home, network, plan, facts, never)
    assert caught.value.code == "memory"


def test_outputs_that_are_no_numbers_are_a_refusal(site: Measured) -> None:
    home, network, plan, facts = site
    with torch.no_grad():
        network.head.bias.fill_(np.nan)
    with pytest.raises(RefusedError) as caught:
        measure(home, network, plan, facts, never)
    assert caught.value.code == "not-finite"
