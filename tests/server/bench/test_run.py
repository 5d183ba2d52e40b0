"""Run: a benchmark of real weights from folder to report, stopped and taken up again."""

from __future__ import annotations

import json
import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from rin.common import formats, weights
from rin.common.backbones import initial
from rin.common.errors import ConfigError
from rin.common.plan import Model
from rin.server.bench.datasets import phantom_dataset
from rin.server.bench.run import bench, print_summary
from rin.server.bench.summary import Summary, summary_table
from rin.server.bench.tasks import FineTuning, Kind, Task, image_folder_task

TUNING = FineTuning(steps=2, batch_size=4, learning_rate=1e-3)
ROWS: dict[str, Kind] = {"phantom-nodule": "auc", "phantom-lesion": "dice"}
TASKS = [Task(n, kind, "", partial(phantom_dataset, n, train=6, test=8), TUNING) for n, kind in ROWS.items()]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    model = Model.model_validate({"backbone": "resnet18", "image-size": 32})
    facts = {"backbone": "resnet18", "norm": "batch", "image_size": 32, "normalisation": "symmetric"}
    paths = []
    for seed in (1, 2):
        network = initial(model, 100 + seed)
        paths.append(tmp_path_factory.mktemp("weights") / "round-0001.safetensors")
        weights.save(paths[-1], network, weights.layout_of(network), facts=facts)
    return paths


def run(paths: list[Path], out: Path, **options: Any) -> tuple[Summary, list[tuple[int, int]]]:
    seen: list[tuple[int, int]] = []
    return bench(paths, TASKS, out, seeds=1, progress=lambda *at: seen.append(at), **options), seen


def test_a_benchmark_writes_summary_and_report_and_is_resumable(checkpoints: list[Path], tmp_path: Path) -> None:
    calls = 0

    def stop_in_the_middle(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(checkpoints[:1], TASKS, tmp_path, seeds=1, progress=stop_in_the_middle)
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").iterdir()}
    assert len(stored) == 3
    assert not (tmp_path / "summary.json").exists()

    summary, seen = run(checkpoints[:1], tmp_path)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {path: path.stat().st_mtime_ns for path in stored} == stored
    found = json.loads((tmp_path / "summary.json").read_text())
    assert [score["task"] for score in found["scores"]] == ["phantom-nodule", "phantom-lesion"]
    assert found["scores"][0]["comparison"]["difference"]["low"] == summary.scores[0].comparison.difference.low
    assert found["scores"][0]["verdict"] == summary.scores[0].verdict
    page = (tmp_path / "report" / "index.html").read_text()
    assert f"{summary.scores[0].comparison.checkpoint.value:.3f}" in page

    for path in stored:
        path.write_bytes(b"damaged")
    again, _ = run(checkpoints[:1], tmp_path)
    assert [score.comparison for score in again.scores] == [score.comparison for score in summary.scores]


def test_several_checkpoints_share_the_random_start_and_get_unique_names(
    checkpoints: list[Path], tmp_path: Path
) -> None:
    summary, _ = run(checkpoints, tmp_path)
    assert len(summary.scores) == 4
    assert len({checkpoint.name for checkpoint in summary.checkpoints}) == 2
    assert all(checkpoint.name.startswith("round-0001-") for checkpoint in summary.checkpoints)
    assert summary.scores[0].comparison.random == summary.scores[1].comparison.random
    assert len(list((tmp_path / "scores").iterdir())) == 2 * 3


@pytest.mark.slow
def test_processes_beside_each_other_find_the_same_figures(checkpoints: list[Path], tmp_path: Path) -> None:
    alone, _ = run(checkpoints[:1], tmp_path / "1", threads=1)
    beside, seen = run(checkpoints[:1], tmp_path / "2", threads=2)
    assert [score.comparison for score in beside.scores] == [score.comparison for score in alone.scores]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not multiprocessing.active_children()


def test_weights_of_any_layout_are_scored(checkpoints: list[Path], tmp_path: Path) -> None:
    """The same backbone in torchvision's keys has the same score, though its file says nothing about itself."""
    torch.save(formats.read(checkpoints[0]).backbone, tmp_path / "foreign.pth")
    options: dict[str, Any] = {"normalisation": "symmetric", "image_size": 32}
    ours = bench(checkpoints[:1], TASKS[:1], tmp_path / "ours", seeds=1)
    foreign = bench([tmp_path / "foreign.pth"], TASKS[:1], tmp_path / "out", seeds=1, **options)
    assert foreign.scores[0].comparison == ours.scores[0].comparison
    facts = foreign.checkpoints[0].facts
    assert (facts["layout"], facts["normalisation"], facts["image_size"]) == ("torchvision", "symmetric", 32)
    assert "statistics" in facts


def test_nothing_and_the_same_twice_are_refused(checkpoints: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint"):
        bench([], TASKS, tmp_path)
    with pytest.raises(ConfigError, match="twice"):
        bench([checkpoints[0], checkpoints[0]], TASKS, tmp_path)


def test_the_table_fits_a_narrow_terminal_and_takes_names_literally(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, _ = run(checkpoints[:1], tmp_path)
    console = Console(width=80, record=True, force_terminal=False)
    console.print(summary_table(summary))
    text = console.export_text()
    for score in summary.scores:
        assert f"{score.comparison.checkpoint.value:.3f}" in text
        assert f"{score.comparison.difference.low:+.3f} to {score.comparison.difference.high:+.3f}" in text
    capsys.readouterr()
    print_summary(summary)
    assert "phantom-" in capsys.readouterr().out


def test_two_tasks_of_one_name_would_overwrite_each_other(checkpoints: list[Path], tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "brain", tmp_path / "b" / "brain"]
    for tasks in ([image_folder_task(each) for each in folders], [TASKS[0], TASKS[0]]):
        with pytest.raises(ConfigError, match=f"two tasks are called {tasks[0].name}") as error:
            bench(checkpoints[:1], tasks, tmp_path / "out")
        assert "rename" in error.value.step
    assert not (tmp_path / "out").exists()


def test_a_file_where_the_folder_should_be_is_said_at_once(checkpoints: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="cannot be a folder") as error:
            bench(checkpoints[:1], TASKS, out, seeds=1, progress=lambda *_: pytest.fail("it began to work"))
        assert "--out" in error.value.step
