import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rin.common.backbones import Network, initial
from rin.common.batches import seeded
from rin.common.errors import RefusedError
from rin.common.evaluate import evaluate
from rin.common.fit import fit, fit_round, infer, pick_device, settle
from rin.common.heads import Single
from rin.common.labels import label_set_digest
from rin.common.plan import Plan
from rin.common.recipe import Recipe, recipe_of
from rin.common.weights import layout_of

CPU = torch.device("cpu")
ROWS = (3, 7, 20)


def plan(
    strategy: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    augment: dict[str, Any] | None = None,
    **training: Any,
) -> Plan:
    changed = {key.replace("_", "-"): value for key, value in training.items()}
    return Plan.model_validate(
        {
            "protocol": 1,
            "name": "test",
            "label-set": label_set_digest(),
            "sites": {"siteA": 1.0, "siteB": 1.0, "siteC": 1.0},
            "model": {"backbone": "resnet18", "image-size": 32, **(model or {})},
            "training": {"rounds": 4, "local-steps": 3, "batch-size": 8, "learning-rate": 0.02, **changed},
            "strategy": strategy or {},
            "augment": augment or {},
        }
    )


class Stripes:
    """Images whose label is the direction or absence of stripes; a Data of 165 labels."""

    def __init__(self, n: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        kind = np.arange(n) % 3
        wave = (np.arange(32) // 2 % 2 * 120).astype(np.float64)
        grids = np.stack([np.tile(wave, (32, 1)), np.tile(wave, (32, 1)).T, np.full((32, 32), 60.0)])
        self.pixels = (grids[kind] + rng.uniform(0, 100, (n, 32, 32))).clip(0, 255).astype(np.uint8)
        self.labels = np.zeros((n, 165), bool)
        self.labels[np.arange(n), np.array(ROWS)[kind]] = True
        self.label_offsets, self.label_indices = np.arange(n + 1), np.array(ROWS)[kind]

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.pixels[index], self.labels[index]


def trained(p: Plan, data: Stripes, *, round: int = 1, site: str = "siteA", threads: int = 1, **keys: Any) -> Network:
    net = initial(p.model, 0)
    fit_round(net, data, p, rows=ROWS, round=round, site=site, device=CPU, threads=threads, **keys)
    return net


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_two_runs_are_bit_identical_and_site_and_round_matter() -> None:
    data = Stripes(30)
    first = trained(plan(), data)
    torch.manual_seed(99)  # the process's own random state must not matter
    assert same(first, trained(plan(), data))
    assert not same(first, trained(plan(), data, site="siteB"))
    assert not same(first, trained(plan(), data, round=2))
    assert not same(first, trained(plan(seed=1), data))


@pytest.mark.parametrize("strategy", [{}, {"name": "fedprox", "mu": 0.1}])
@pytest.mark.parametrize("target", ["single", "multi"])
def test_undeclared_rows_stay_and_counts_add_up(strategy: dict[str, Any], target: str) -> None:
    p = plan(strategy, {"target": target}, weight_decay=0.1)
    start, net = initial(p.model, 0), initial(p.model, 0)
    result = fit_round(
        net, Stripes(30), p, rows=ROWS, exhaustive_rows=ROWS, round=1, site="siteA", device=CPU, threads=1
    )
    others = [row for row in range(165) if row not in ROWS]
    assert torch.equal(net.head.weight[others], start.head.weight[others])
    assert torch.equal(net.head.bias[others], start.head.bias[others])
    assert not torch.equal(net.head.weight[list(ROWS)], start.head.weight[list(ROWS)])
    assert result.steps == 3
    assert result.metrics["images"] == 24
    assert 0 <= result.metrics["top1"] <= result.metrics["top5"] == 24


def test_learns_the_stripes_and_evaluate_says_so() -> None:
    p = plan(local_steps=25, rounds=1)
    net = trained(p, Stripes(90))
    held = Stripes(60, seed=1)
    found = evaluate(net, held, p, rows=ROWS, device=CPU, threads=1)
    before = evaluate(initial(p.model, 0), held, p, rows=ROWS, device=CPU, threads=1)
    assert found.metrics["top1"] >= 54
    assert found.metrics["loss"] < 0.5 < before.metrics["loss"]
    assert found.metrics["images"] == 60
    assert found.logits.shape == (60, 165)
    assert np.array_equal(found.labels, held.labels)


def test_fedprox_holds_the_weights_back() -> None:
    data = Stripes(30)
    start = initial(plan().model, 0)

    def moved(p: Plan) -> float:
        net = trained(p, data)
        pairs = zip(net.parameters(), start.parameters(), strict=True)
        return math.sqrt(sum(float((a - b).detach().pow(2).sum()) for a, b in pairs))

    free = moved(plan(local_steps=8))
    assert moved(plan({"name": "fedprox", "mu": 0.0}, local_steps=8)) == free
    assert moved(plan({"name": "fedprox", "mu": 10.0}, local_steps=8)) < 0.9 * free


EVERYTHING: dict[str, Any] = {
    "max_gradient_norm": 1.0,
    "label_smoothing": 0.1,
    "sampling": "balanced",
    "mixup": 0.4,
    "ema": 0.5,
    "augment": {"zoom": 0.1, "rotation": 10.0, "window": 0.1, "gamma": 0.2, "erase": 0.3},
}


@pytest.mark.parametrize("target", ["single", "multi"])
def test_every_option_together_is_bit_identical_and_keeps_undeclared_rows(target: str) -> None:
    p = plan(model={"target": target}, **EVERYTHING, weight_decay=0.1)
    first = trained(p, Stripes(30), exhaustive_rows=ROWS)
    assert same(first, trained(p, Stripes(30), exhaustive_rows=ROWS))
    others = [row for row in range(165) if row not in ROWS]
    assert torch.equal(first.head.weight[others], initial(p.model, 0).head.weight[others])


@pytest.mark.parametrize(
    "option",
    [
        {"max_gradient_norm": 0.1},
        {"label_smoothing": 0.1},
        {"sampling": "balanced"},
        {"logit_adjustment": 1.0},
        {"mixup": 0.4},
        {"ema": 0.5},
        {"augment": {"brightness": 0.0}},
    ],
)
def test_every_option_of_the_plan_reaches_the_steps(option: dict[str, Any]) -> None:
    uneven = Stripes(30)
    uneven.label_indices = np.array([ROWS[0]] * 20 + [ROWS[1]] * 9 + [ROWS[2]])
    usual, other = (trained(plan(local_steps=2, **chosen), uneven) for chosen in ({}, option))
    assert not same(usual, other)


def test_a_mean_of_weights_is_what_the_round_ends_with() -> None:
    seen: list[dict[str, torch.Tensor]] = []
    p, net = plan(ema=0.5), initial(plan().model, 0)

    def keep(done: int, steps: int) -> None:
        seen.append({name: value.clone() for name, value in net.state_dict().items()})

    fit_round(net, Stripes(30), p, rows=ROWS, round=1, site="siteA", device=CPU, threads=1, progress=keep)
    for name in ("backbone.conv1.weight", "backbone.bn1.running_mean"):
        mean = (0.25 * seen[0][name] + 0.5 * seen[1][name] + seen[2][name]) / 1.75
        torch.testing.assert_close(net.state_dict()[name], mean)


def test_clipped_gradients_move_the_weights_by_the_norm() -> None:
    settle(CPU, 1)
    net = nn.Linear(2, 2)
    before = [p.detach().clone() for p in net.parameters()]
    recipe = Recipe(
        steps=1, learning_rate=1.0, momentum=0.0, weight_decay=0.0, schedule="constant", max_gradient_norm=0.5
    )
    stream = [(torch.ones(4, 2), torch.zeros(4))]
    fit(net, lambda first: stream, lambda out, _: out.sum() * 100, recipe, device=CPU, key=("a test",))
    moved = sum(float((p - old).detach().pow(2).sum()) for p, old in zip(net.parameters(), before, strict=True))
    assert math.sqrt(moved) == pytest.approx(0.5, rel=1e-4)


def test_cancelled_within_one_step() -> None:
    seen: list[tuple[int, int]] = []
    with pytest.raises(RefusedError) as caught:
        trained(plan(local_steps=50), Stripes(30), progress=lambda *at: seen.append(at), cancelled=lambda: bool(seen))
    assert caught.value.code == "cancelled"
    assert seen == [(1, 50)]


def test_not_finite_and_no_data_are_refused() -> None:
    with pytest.raises(RefusedError) as caught:
        trained(plan(learning_rate=1e38, momentum=0.0), Stripes(30))
    assert caught.value.code == "not-finite"
    with pytest.raises(RefusedError) as caught:
        trained(plan(), Stripes(0))
    assert caught.value.code == "no-data"
    with pytest.raises(RefusedError) as caught:
        evaluate(initial(plan().model, 0), Stripes(0), plan(), rows=ROWS, device=CPU, threads=1)
    assert caught.value.code == "no-data"


def test_schedule_runs_over_the_whole_federated_run() -> None:
    p = plan(warmup_steps=4, learning_rate=1.0)
    rates = [recipe_of(p, r).rate(i) for r in range(1, 5) for i in range(3)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert recipe_of(plan(schedule="constant"), 3).rate(2) == 0.02


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fit_decays_weights_but_not_biases(optimizer: str) -> None:
    settle(CPU, 1)
    net = nn.Linear(2, 2)
    before = [p.detach().clone() for p in net.parameters()]
    zeros = [(torch.zeros(1, 2), torch.zeros(1))]
    recipe = Recipe(steps=1, learning_rate=0.1, weight_decay=0.5, schedule="constant")
    chosen = dataclasses.replace(recipe, optimizer=optimizer)
    fit(net, lambda first: zeros, lambda out, _: out.sum() * 0.0, chosen, device=CPU, key=("a test",))
    torch.testing.assert_close(net.weight.detach(), before[0] * 0.95)
    assert torch.equal(net.bias, before[1])


def test_infer_runs_in_batches_and_can_be_cancelled() -> None:
    net = initial(plan().model, 0).eval()
    pixels = Stripes(7).pixels
    whole = infer(net.features, pixels, device=CPU)
    assert whole.shape == (7, 512)
    np.testing.assert_allclose(whole, infer(net.features, pixels, device=CPU, batch_size=3), atol=0.05)
    with pytest.raises(RefusedError):
        infer(net.features, pixels, device=CPU, cancelled=lambda: True)


def test_layout_survives_training_in_channels_last() -> None:
    p = plan()
    assert layout_of(trained(p, Stripes(30))) == layout_of(initial(p.model, 0))


def test_device_names() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda")


@pytest.mark.slow
def test_a_compiled_network_trains_alike_and_one_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settle(CPU, 1)
    draw = seeded("compiled")
    inputs, labels = torch.rand(8, 1, 9, 9, generator=draw), torch.eye(5).bool()[torch.arange(8) % 5]

    def run(width: int, *, compile: bool) -> tuple[float, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width * 49, 5))
        goal, recipe = Single(range(5)), Recipe(steps=5, learning_rate=0.05)
        loss = fit(net, lambda at: [(inputs, labels)] * 5, goal, recipe, device=CPU, key=("c",), compile=compile)
        return loss, net.state_dict()

    (loss, state), (other, compiled) = run(8, compile=False), run(8, compile=True)
    assert loss == pytest.approx(other, rel=1e-2)  # bf16 is rounded in other places
    assert list(state) == list(compiled)
    torch.testing.assert_close(state, compiled, rtol=1e-2, atol=1e-2)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/g++",))
    with pytest.raises(RefusedError) as caught:
        run(6, compile=True)
    assert caught.value.code == "device"
