"""The command line of the coordinator: bad input ends in one line that names the input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18
from typer.testing import CliRunner

from rin.common.errors import ConfigError
from rin.server.cli import app
from tests.simulator import plan_text


@pytest.mark.parametrize("command", ["init", "run"])
@pytest.mark.parametrize(
    ("name", "words"), [("nope.toml", "is missing"), (".", "cannot be read"), ("odd.toml", "odd.toml: ")]
)
def test_a_plan_that_is_none_is_named(tmp_path: Path, command: str, name: str, words: str) -> None:
    (tmp_path / "odd.toml").write_text("protocol = 1\n")
    run = tmp_path / "run"
    if command == "run":
        assert CliRunner().invoke(app, ["init", "--run", str(run)]).exit_code == 0
    done = CliRunner().invoke(app, [command, "--run", str(run), "--plan", str(tmp_path / name)])
    assert isinstance(done.exception, ConfigError)
    assert words in str(done.exception)
    assert done.exception.step


def test_a_warning_of_the_guard_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = resnet18(num_classes=2)
    network.bn1.running_mean.add_(1e4)  # type: ignore[operator]
    torch.save(network.state_dict(), tmp_path / "w")
    (tmp_path / "plan.toml").write_bytes(plan_text(["a", "b", "c"], model={"normalisation": "imagenet"}))
    for words in (
        ["export", str(tmp_path / "w"), "--out", str(tmp_path / "out")],
        [
            "init",
            "--run",
            str(tmp_path / "run"),
            "--plan",
            str(tmp_path / "plan.toml"),
            "--weights",
            str(tmp_path / "w"),
        ],
    ):
        caplog.clear()
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        assert (caplog.text + done.output).count("fit no known normalisation") == 1
