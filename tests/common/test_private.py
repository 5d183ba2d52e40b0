"""The private step: against brute force, its sensitivity, its noise, its sampling, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from rin.common import fit
from rin.common.backbones import BACKBONES, Network, initial
from rin.common.errors import RefusedError
from rin.common.heads import Single
from rin.common.noise import Source
from rin.common.plan import IMAGE_SIZES, Model, Plan
from rin.common.private import (
    CHUNK,
    Mechanism,
    PatientGradients,
    Sampler,
    check,
    chunks,
    fit_private,
    side_by_side,
    squared_norm,
    steps,
)
from rin.common.snapshots import Snapshots
from tests.common.test_fit import plan
from tests.learning.setup import shallow
from tests.simulator import TINY

CPU = torch.device("cpu")
ROWS = (0, 1, 2, 3)
PLAIN = Mechanism(rate=0.5, patients=8.0, images=4, views=1, clip=1.0, sigma=0.0)
Bag = tuple[Tensor, Tensor]


def bags_of(sizes: tuple[int, ...], side: int, dtype: torch.dtype = torch.float32) -> list[Bag]:
    draw = torch.Generator().manual_seed(3)
    found = []
    for number, size in enumerate(sizes):
        labels = torch.zeros(size, 165, dtype=torch.bool)
        labels[torch.arange(size), (torch.arange(size) + number) % len(ROWS)] = True
        found.append((torch.rand(size, 1, side, side, generator=draw).to(dtype), labels))
    return found


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Softmax over the declared rows in the precision of the logits: `Single` is made for float32."""
    soft = Single(ROWS).soft(targets).to(logits.dtype)
    return nn.functional.cross_entropy(logits[:, list(ROWS)], soft)


def gradient_of(module: nn.Module, bag: Bag) -> Tensor:
    """All of one patient's gradient as one vector, by an ordinary backward pass."""
    module.zero_grad()
    loss(module(bag[0]), bag[1]).backward()
    flat = [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in module.parameters()]
    return torch.cat(flat).clone()


def ours(module: nn.Module, bags: list[Bag], mechanism: Mechanism, *, together: bool = False) -> Tensor:
    gradients = PatientGradients(module, loss, mechanism, Source(), device=CPU, together=together)
    for few in side_by_side(bags):
        gradients.add(*few)
    gradients.settle()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


LONG = {"inception_resnet_v2", "inception_v3", "swin_t"}  # in float64


@pytest.mark.parametrize(
    ("backbone", "dtype", "most"),
    [(name, torch.float32, 1e-4) for name in BACKBONES]
    + [
        pytest.param(name, torch.float64, 1e-12, marks=[pytest.mark.slow] if name in LONG else []) for name in BACKBONES
    ],
)
def test_a_step_is_the_mean_of_clipped_patients(backbone: str, dtype: torch.dtype, most: float) -> None:
    fit.settle(CPU, 1)
    side = IMAGE_SIZES[backbone].smallest  # type: ignore[index]
    model = Model.model_validate({"backbone": backbone, "norm": "group", "image-size": side})
    network = initial(model, 1).to(dtype).eval()  # dropout apart, as the two sides draw in another order
    bags = bags_of((1, 3, 2, 4), side, dtype)
    each = [gradient_of(network, bag) for bag in bags]
    norms = sorted(g.double().norm().item() for g in each)
    clip = (norms[1] + norms[2]) / 2
    wanted = sum(g * min(1.0, clip / (g.double().norm().item() + 1e-6)) for g in each)
    assert isinstance(wanted, Tensor)
    assert norms[0] < clip < norms[-1]  # some are clipped and some are not
    for together in (False, True)[: 1 if backbone == "swin_t" else 2]:
        found = ours(network, bags, replace(PLAIN, clip=clip), together=together) * PLAIN.patients
        assert (found - wanted).double().norm() <= most * wanted.double().norm()


class Steep(nn.Module):
    """One layer whose gradients a test can make as large as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 165)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1)[:, :16])


def hostile() -> dict[str, Bag]:
    """Patients that would move the weights further than they may."""
    one = torch.zeros(1, 165, dtype=torch.bool)
    one[0, 1] = True
    image = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return {
        "a thousand times the same image": (image.repeat(1000, 1, 1, 1), one.repeat(1000, 1)),
        "huge values": (image * 1e18, one),
        "infinite values": (image * math.inf, one),
        "no numbers": (image * math.nan, one),
        "one pixel that is no number": (image.index_fill(2, torch.tensor([0]), math.nan), one),
        "nothing": (image * 0, one),
        "an ordinary one": (image, one),
    }


@pytest.mark.parametrize("kind", list(hostile()))
@pytest.mark.parametrize("others", [0, 1, 60])
@pytest.mark.parametrize("together", [False, True])
def test_no_patient_moves_the_sum_further_than_the_clip(kind: str, others: int, together: bool) -> None:
    torch.manual_seed(0)
    module, clip = Steep(), 0.7
    rest = bags_of((2,) * others, 4)
    mechanism = replace(PLAIN, clip=clip)
    without = ours(module, rest, mechanism, together=together)
    with_it = ours(module, [hostile()[kind], *rest], mechanism, together=together)
    assert with_it.isfinite().all()
    assert (with_it - without).double().norm() * PLAIN.patients <= clip * (1 + 1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_norm_of_large_tensors_is_right(layout: torch.memory_format) -> None:
    even = torch.full((2048, 512, 3, 3), 0.1).to(memory_format=layout)
    odd = torch.randn(165, 513, generator=torch.Generator().manual_seed(0))
    wanted = even.double().square().sum() + odd.double().square().sum()
    assert squared_norm([even, odd, torch.zeros(3)]).item() == pytest.approx(wanted.item(), rel=1e-7)
    assert not squared_norm([odd, torch.tensor([1.0, math.inf])]).isfinite()
    assert squared_norm([torch.full((3,), 2.0, dtype=torch.float64)]).item() == 12.0


@pytest.mark.parametrize("together", [False, True])
def test_patients_that_are_no_numbers_are_left_out_and_counted(together: bool) -> None:
    gradients = PatientGradients(Steep(), loss, PLAIN, Source(), device=CPU, together=together)
    for few in side_by_side(hostile().values()):
        gradients.add(*few)
    assert gradients.skipped == 3


def test_noise_is_of_the_declared_size_in_every_parameter_also_without_patients() -> None:
    module = nn.Sequential(nn.Linear(600, 500), nn.Conv2d(8, 16, 3))
    mechanism = replace(PLAIN, clip=0.3, sigma=1.7)
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)  # nobody's seed repeats it
        gradients = PatientGradients(module, loss, mechanism, Source(), device=CPU)
        gradients.settle()
        drawn.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).double())
    for found in drawn:
        values = found.numpy() * mechanism.patients / (0.3 * 1.7)
        assert abs((values**2).sum() - len(values)) < 6 * math.sqrt(2 * len(values))
        assert stats.kstest(values, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(drawn[0], drawn[1])[0, 1]) < 6 / math.sqrt(len(drawn[0]))


def test_every_head_row_gets_noise_whoever_has_images_of_it() -> None:
    module = Steep()
    gradients = PatientGradients(module, loss, replace(PLAIN, sigma=1.0), Source(), device=CPU)
    gradients.add(*bags_of((2,), 4))
    gradients.settle()
    assert module.layer.weight.grad is not None
    assert (module.layer.weight.grad != 0).all()


class Archive:
    """Patients with different numbers of images of 8 x 8, label by patient."""

    def __init__(self, images: tuple[int, ...], rows: tuple[int, ...] = ROWS) -> None:
        self.patient = np.repeat(np.arange(len(images)), images)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.patient)

    def batch(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels = np.zeros((len(index), 165), bool)
        kinds = self.patient[index] % len(self.rows)
        labels[np.arange(len(index)), np.array(self.rows)[kinds]] = True
        wave = np.sin(np.arange(32) * (0.2 + 0.3 * kinds[:, None])) * 60 + 120
        return np.repeat(wave[:, None, :], 32, axis=1).astype(np.uint8), labels


def test_patients_are_drawn_by_themselves_whatever_the_number_of_their_images() -> None:
    archive, turns = Archive((1, 10, 3, 1, 50) * 8), 3000
    mechanism = replace(PLAIN, rate=0.1, images=4)
    sampler, hits = Sampler(archive.patient, mechanism, Source()), np.zeros(40)
    for _ in range(turns):
        for drawn in sampler.step():
            owners = archive.patient[drawn]
            assert len(set(owners.tolist())) == 1
            assert len(set(drawn.tolist())) == len(drawn) == min(4, (1, 10, 3, 1, 50)[owners[0] % 5])
            hits[owners[0]] += 1
    assert np.abs(hits - turns * 0.1).max() < 6 * math.sqrt(turns * 0.09)


def test_few_images_stand_side_by_side() -> None:
    sizes = [[len(inputs) for inputs, _ in few] for few in side_by_side(bags_of((1, 1, 1, 1, 1, 4, 2, 2, 9, 3, 1), 4))]
    assert sizes == [[1, 1, 1, 1], [4], [1, 2], [9], [3], [2, 1]]
    assert list(side_by_side([])) == []


def test_nobody_and_everybody_can_be_drawn() -> None:
    assert Sampler(np.zeros(0, np.int64), PLAIN, Source()).step() == []
    everybody = Sampler(Archive((2, 1)).patient, replace(PLAIN, rate=1.0), Source()).step()
    assert [one.tolist() for one in everybody] == [[0, 1], [2]]
    assert list(chunks([])) == []
    parts = list(chunks([np.arange(CHUNK - 1), np.arange(1), np.arange(1), np.arange(2 * CHUNK)]))
    assert [[len(one) for one in part] for part in parts] == [[CHUNK - 1, 1], [1], [2 * CHUNK]]


def test_a_step_brings_every_drawn_patient_in_one_bag() -> None:
    archive = Archive((3, 1, 40, 70, 2))
    mechanism = replace(PLAIN, rate=1.0, images=30, views=2)
    stream = steps(archive, mechanism, Source(), size=32, device=CPU, options=plan().augment)
    for _ in range(2):
        found = [(len(x), len(y), x.shape[1:]) for x, y in next(stream)]
        assert found == [(2 * n, 2 * n, (1, 32, 32)) for n in (3, 1, 30, 30, 2)]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "resnet18", TINY)


def private_plan(**training: Any) -> Plan:
    return plan(model={"norm": "group"}, **{"rounds": 1, "local_steps": 6, **training})


@pytest.mark.parametrize("freeze", ["none", "head", "top10"])
def test_three_modes_are_one_path_and_only_declared_rows_move(freeze: str) -> None:
    agreed = private_plan(freeze=freeze, ema=0.9)
    network = initial(agreed.model, 0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    mechanism = Mechanism(rate=0.5, patients=5.0, images=2, views=1, clip=1.0, sigma=0.5)
    skipped = fit_private(
        network,
        Archive((1, 3, 2) * 3),
        agreed,
        mechanism,
        rows=ROWS,
        round=1,
        device=CPU,
        threads=1,
    )
    assert skipped == 0
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert {"head.weight", "head.bias"} <= moved
    still = [row for row in range(165) if row not in ROWS]
    assert torch.equal(network.head.weight[still], before["head.weight"][still])
    assert not torch.equal(network.head.weight[list(ROWS)], before["head.weight"][list(ROWS)])
    backbone = {name for name in moved if name.startswith("backbone.")}
    assert bool(backbone) == (freeze != "head")
    assert ("backbone.conv1.weight" in backbone) == (freeze == "none")


def test_it_learns_where_there_is_little_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "resnet18", shallow((16, 32), 32))
    agreed = private_plan(optimizer="adamw", learning_rate=3e-3, local_steps=30)
    network, archive = initial(agreed.model, 0), Archive((2,) * 40)
    mechanism = Mechanism(rate=0.5, patients=20.0, images=2, views=1, clip=1.0, sigma=0.02)
    fit_private(network, archive, agreed, mechanism, rows=ROWS, round=1, device=CPU, threads=1)
    images, labels = archive.batch(np.arange(len(archive)))
    logits = fit.infer(network.eval(), images, device=CPU)[:, list(ROWS)]
    assert (logits.argmax(1) == labels[:, list(ROWS)].argmax(1)).mean() > 0.9


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("images", [(1, 1, 1), (1, 9, 1)])
def test_memory_ends_before_the_debit_whoever_is_there(
    monkeypatch: pytest.MonkeyPatch, images: tuple[int, ...]
) -> None:
    forward, charged = Network.forward, []

    def narrow(self: Network, x: Tensor) -> Tensor:
        if len(x) > 5:
            raise MemoryError
        return forward(self, x)

    monkeypatch.setattr(Network, "forward", narrow)
    mechanism = Mechanism(rate=1.0, patients=3.0, images=4, views=2, clip=1.0, sigma=1.0)
    agreed = private_plan()
    with pytest.raises(RefusedError, match="memory"):
        fit_private(
            initial(agreed.model, 0),
            Archive(images),
            agreed,
            mechanism,
            rows=ROWS,
            round=1,
            device=CPU,
            threads=1,
            charge=lambda: charged.append(1),
        )
    assert not charged


@pytest.mark.usefixtures("tiny")
def test_the_same_round_again_gives_other_weights() -> None:
    agreed, found = private_plan(), []
    mechanism = Mechanism(rate=1.0, patients=4.0, images=1, views=1, clip=1.0, sigma=1.0)
    for _ in range(2):
        network = initial(agreed.model, 0)
        fit_private(network, Archive((1, 1)), agreed, mechanism, rows=ROWS, round=1, device=CPU, threads=1)
        found.append(network.head.weight.detach().clone())
    assert not torch.equal(found[0], found[1])


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_round_goes_on_and_its_snapshot_holds_no_key(tmp_path: Path) -> None:
    agreed = private_plan()
    mechanism = Mechanism(rate=1.0, patients=4.0, images=1, views=1, clip=1.0, sigma=1.0)
    seen: list[int] = []

    def go(most: int) -> Network:
        network = initial(agreed.model, 0)
        fit_private(
            network,
            Archive((1, 1)),
            agreed,
            mechanism,
            rows=ROWS,
            round=1,
            device=CPU,
            threads=1,
            progress=lambda step, _: seen.append(step),
            cancelled=lambda: len(seen) >= most,
            snapshots=Snapshots(tmp_path / "snapshot", "round", every=0.0),
        )
        return network

    with pytest.raises(RefusedError, match="cancelled"):
        go(3)
    kept = (tmp_path / "snapshot").stat().st_size
    weights = sum(p.numel() for p in initial(agreed.model, 0).parameters()) * 4
    assert kept < 2.2 * weights  # weights and momentum
    go(99)
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("backbone", ["resnet18", "densenet121", "inception_resnet_v2"])
def test_networks_that_mix_patients_are_refused(backbone: str) -> None:
    with pytest.raises(RefusedError, match="cannot use these layers") as caught:
        check(initial(Model.model_validate({"backbone": backbone}), 0))
    assert caught.value.code == "policy"
    assert "group" in caught.value.step
    check(initial(Model.model_validate({"backbone": backbone, "norm": "group"}), 0))
