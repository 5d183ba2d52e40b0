"""Two processes train what one trains: every slice counts what it holds, to float32's rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rin.common import fit
from rin.common.backbones import initial
from rin.common.heads import LOSSES
from rin.common.norms import batch_norms
from rin.common.parallel import Ranks, synchronised
from tests.common.ranks import plan_of, train
from tests.common.test_fit import plan

BATCH = 7  # slices of three and of four images


def together(out: Path, target: str, stop: int = 0) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", "-m", "tests.common.ranks", str(out), target, str(BATCH), str(stop)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    )
    assert (done.returncode != 0) == bool(stop), done.stderr


@pytest.mark.slow  # the default suite has tests/client/test_parallel.py
@pytest.mark.parametrize("target", ["multi", "single"])
def test_two_processes_give_the_weights_of_one(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "half_precision", fit.half_precision)  # put back afterwards
    together(tmp_path, target, stop=2)  # killed, and goes on
    assert not (tmp_path / "0.pt").exists()
    together(tmp_path, target)
    network, result = train(plan_of(target, BATCH), None, None, 0)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, value in network.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        assert (states[0][name] - value).abs().max() < 1e-6, name
    for rank in (0, 1):
        figures = json.loads((tmp_path / f"{rank}.json").read_text())
        assert figures == pytest.approx(result.metrics, rel=1e-5)


def test_the_slices_of_a_batch_are_the_batch() -> None:
    def batches(first: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.arange(10.0) + first, torch.arange(10))]

    for size in (1, 2, 3, 10):
        parts = [next(iter(Ranks(rank, size).slices(batches)(5))) for rank in range(size)]
        assert torch.equal(torch.cat([part[0] for part in parts]), torch.arange(10.0) + 5)
        assert {len(part[1]) for part in parts} <= {10 // size, -(-10 // size)}


@pytest.mark.parametrize("backbone", ["resnet18", "inception_resnet_v2"])
def test_synchronised_norms_keep_names_values_and_fused_activations(backbone: str) -> None:
    model = plan(model={"backbone": backbone, "image-size": 96}).model
    network, images = initial(model, 0, 3).eval(), torch.rand(2, 1, 96, 96)
    names, before = list(network.state_dict()), network(images)
    changed = synchronised(network)
    assert changed is network
    assert list(network.state_dict()) == names
    assert all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in batch_norms(network).values())
    assert torch.equal(network(images), before)  # in evaluation they need nobody else


@pytest.mark.parametrize("target", ["single", "multi"])
def test_a_loss_is_the_mean_of_its_parts_by_what_they_count(target: str) -> None:
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 165, generator=draw), torch.rand(9, 165, generator=draw) < 0.3
    labels[:, 3] = True
    rows, exhaustive = (3, 7, 20, 30), (7, 20)
    loss = LOSSES[target](rows, exhaustive)
    parts = [(loss(logits[p], labels[p]), loss.count(labels[p])) for p in (slice(0, 2), slice(2, 9))]
    whole = sum(value * n for value, n in parts) / loss.count(labels)
    assert torch.allclose(torch.as_tensor(whole), loss(logits, labels))
