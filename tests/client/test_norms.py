"""Norm layers of a site's own: they go on where they were, round for round, and the mean of all still travels."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rin.client.norms import LocalNorms, tensors_of
from rin.client.trainer import Trainer
from rin.common.backbones import initial
from rin.common.errors import StateError
from rin.common.layout import file_digest
from rin.common.plan import Model
from rin.common.weights import layout_of, read_into, read_state
from rin.common.wire import Request
from rin.server.record import last_record
from tests.simulator import RUN_ID, Consortium, small

LOCAL = {"backbone": "resnet18", "image_size": 32, "local_norms": True}
NORMS = ("backbone.bn1.bias", "backbone.bn1.running_mean", "backbone.bn1.running_var", "backbone.bn1.weight")


pytestmark = pytest.mark.usefixtures("tiny")


def network(seed: int) -> torch.nn.Module:
    model = Model.model_validate({"backbone": "resnet18", "image-size": 32})
    return initial(model, seed)


def test_a_round_starts_with_the_norms_of_the_newest_round_before_it(tmp_path: Path) -> None:
    norms = LocalNorms(tmp_path / "norms")
    module = network(0)
    assert {*NORMS} <= tensors_of(module).keys() <= {*NORMS, "backbone.bn1.num_batches_tracked"}
    assert norms.bring(module, 1) == 0
    for round in (1, 2, 5):
        torch.nn.init.constant_(tensors_of(module)[NORMS[3]], round)
        norms.keep(module, round)
    other = network(1)
    convolution = other.state_dict()["backbone.conv1.weight"].clone()
    assert norms.bring(other, 5) == 2  # never its own
    assert norms.bring(other, 5) == 2
    assert torch.equal(tensors_of(other)[NORMS[3]], torch.full((8,), 2.0))
    assert torch.equal(other.state_dict()["backbone.conv1.weight"], convolution)
    assert norms.bring(other, 9) == 5
    assert [path.stem for path in norms.folder.iterdir()] == ["000005"]


def test_a_damaged_file_says_so(tmp_path: Path) -> None:
    norms = LocalNorms(tmp_path)
    norms.keep(network(0), 1)
    (tmp_path / "000001.safetensors").write_bytes(b"x")
    with pytest.raises(StateError, match="is damaged"):
        norms.bring(network(0), 2)


def global_weights(this: Consortium, round: int) -> torch.nn.Module:
    module = initial(this.plan.model, 0)
    read_into(module, this.run.checkpoint(round), layout_of(module))
    return module


def test_sites_keep_their_norms_and_the_checkpoint_holds_their_mean(tmp_path: Path) -> None:
    this, plain = small(tmp_path / "local", model=LOCAL), small(tmp_path / "plain")
    this.go()
    plain.go()
    first, second = (tensors_of(global_weights(this, round)) for round in (1, 2))
    shares = {"siteA": 1 / 6, "siteB": 2 / 6, "siteC": 3 / 6}  # the weights of the plan
    for name in NORMS:
        own = {}
        for site, home in this.homes.items():
            (path,) = home.norms.glob("*/000002.safetensors")
            own[site] = read_state(path)[1][name]
        assert not torch.equal(own["siteA"], own["siteB"])
        mean = sum(share * own[site] for site, share in shares.items())
        assert torch.allclose(second[name], torch.as_tensor(mean), atol=1e-5)
        assert not torch.equal(first[name], second[name])
    # The first round is the same: nobody has norms of its own yet.
    assert file_digest(plain.run.checkpoint(1)) == file_digest(this.run.checkpoint(1))
    assert file_digest(plain.run.checkpoint(2)) != file_digest(this.run.checkpoint(2))


def test_a_round_that_is_trained_again_has_the_same_bits(tmp_path: Path) -> None:
    this = small(tmp_path, model=LOCAL)
    this.go()
    home, data = this.homes["siteA"], this.run.plan.read_bytes()
    record = last_record(this.run)
    assert record is not None
    facts = {"run": RUN_ID, "round": 2, "site": "siteA", "plan": record.plan, "base": record.base, "deadline_s": 9.0}
    folder = home.jobs / Request.model_validate(facts).id
    before = file_digest(folder / "update.safetensors")
    (folder / "update.json").unlink()  # as if it had been killed before it could remember
    done = Trainer(home).train(Request.model_validate(facts), data, lambda _: None, lambda: "")
    assert done.update == before
    shutil.rmtree(home.norms)  # and it is the norms that make the difference
    (folder / "update.json").unlink()
    assert Trainer(home).train(Request.model_validate(facts), data, lambda _: None, lambda: "").update != before
