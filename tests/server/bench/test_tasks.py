"""Tasks: the table's rows and rows from a folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from rin.common.errors import ConfigError
from rin.server.bench.tasks import TASKS, FineTuning, image_folder_task, named_tasks


def test_rows_carry_their_own_name_and_a_known_kind() -> None:
    assert all(task.name == name and task.kind in ("auc", "dice") for name, task in TASKS.items())


def test_the_auc_task_has_few_training_and_a_thousand_test_images() -> None:
    load = TASKS["phantom-nodule"].load
    assert isinstance(load, partial)
    assert load.keywords["train"] <= 128
    assert load.keywords["test"] >= 1000


@pytest.mark.parametrize("name", ["phantom-nodule", ".", "a b", "../x", "<b>", "é"])
def test_names_that_would_be_paths_or_markup_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a task's name") as error:
        image_folder_task(Path(), name)
    assert "ln -s" in error.value.step


def test_a_large_data_set_gets_its_epochs_and_a_small_one_its_steps() -> None:
    tuning = FineTuning(steps=100, batch_size=32, learning_rate=1e-3, epochs=10)
    assert tuning.steps_for(160) == 100
    assert tuning.steps_for(32_000) == 10_000


def test_a_folders_name_is_its_tasks_name(tmp_path: Path) -> None:
    (tmp_path / "brain-mr").mkdir()
    assert image_folder_task(tmp_path / "brain-mr").name == "brain-mr"
    assert image_folder_task(tmp_path / "brain-mr", "other").name == "other"
    (tmp_path / "link").symlink_to(tmp_path / "brain-mr")  # what the step says about odd and equal names helps
    assert image_folder_task(tmp_path / "link").name == "link"
    assert image_folder_task(tmp_path / "brain-mr" / "x" / "..").name == "brain-mr"


def test_named_tasks_names_what_it_does_not_know() -> None:
    assert [task.name for task in named_tasks(["phantom-lesion"])] == ["phantom-lesion"]
    with pytest.raises(ConfigError, match="unknown task nope"):
        named_tasks(["nope", "phantom-lesion"])
