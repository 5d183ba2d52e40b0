"""Learning is real: what the federation learns against random weights, single sites and pooled training, three seeds.

Two processes of one thread each; 16 minutes on two free cores. The figures are printed as one JSON line a seed.
"""

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rin.server.phantom import SITES
from tests.learning import jobs

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)
ALL = jobs.ROUNDS * jobs.STEPS * len(SITES)  # steps of pooled training that see as many images as the federation


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, dict[str, Any]]]:
    """Seed to the results of every training."""
    root = tmp_path_factory.mktemp("learning")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        drawn = {seed: pool.submit(jobs.images, root, seed) for seed in SEEDS}
        runs = {seed: _trainings(pool, drawn[seed], root, seed) for seed in SEEDS}
        results = {seed: {name: each.result() for name, each in run.items()} for seed, run in runs.items()}
    for seed, result in results.items():
        print(json.dumps({"seed": seed, **_figures(result)}))
    yield results


def _trainings(
    pool: ProcessPoolExecutor, drawn: Future[None], root: Path, seed: int
) -> dict[str, Future[dict[str, Any]]]:
    drawn.result()
    return {
        "federated": pool.submit(jobs.federated, root, seed),
        "pooled": pool.submit(jobs.pooled, root, seed, ALL),
        "half": pool.submit(jobs.pooled, root, seed, ALL // 2),
        **{site: pool.submit(jobs.single, root, seed, site) for site in sorted(SITES)},
    }


def _figures(result: dict[str, Any]) -> dict[str, float]:
    task = result["federated"]["task"].comparison
    probes = {f"probe of {name}": round(each["probe"], 4) for name, each in result.items()}
    heads = {f"head of {name}": round(result[name]["auc"], 4) for name in ("federated", "pooled", "half")}
    tasks = {"task from federated": round(task.checkpoint.value, 4), "task from random": round(task.random.value, 4)}
    return {**probes, **heads, **tasks}


def test_federated_weights_beat_random_ones_on_the_auc_task(found: dict[int, dict[str, Any]]) -> None:
    gains = [found[seed]["federated"]["task"].comparison.difference.value for seed in SEEDS]
    assert np.mean(gains) >= 0.05, gains
    assert min(gains) >= 0.05, gains


def test_federated_backbone_beats_every_single_site(found: dict[int, dict[str, Any]]) -> None:
    for seed in SEEDS:
        best = max(found[seed][site]["probe"] for site in SITES)
        assert found[seed]["federated"]["probe"] > best, (seed, found[seed])


def test_federated_backbone_is_near_the_pooled_one(found: dict[int, dict[str, Any]]) -> None:
    for seed in SEEDS:
        assert found[seed]["federated"]["probe"] >= found[seed]["pooled"]["probe"] - 0.05, (seed, found[seed])


def test_pooled_training_has_saturated(found: dict[int, dict[str, Any]]) -> None:
    """Twice the images bring little more: what the federation lacks is not what longer training would bring."""
    gains = [found[seed]["pooled"]["probe"] - found[seed]["half"]["probe"] for seed in SEEDS]
    assert np.mean(gains) <= 0.02, gains
    assert min(found[seed]["pooled"]["auc"] for seed in SEEDS) >= 0.85, "the task is not learnt at all"
