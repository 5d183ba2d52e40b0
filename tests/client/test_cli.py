"""The command line of a site: bad input ends in one line that names it, and every end names the next step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rin.client.cli import app
from tests.simulator import plan_text


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rin.client.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("plan", "out", "words"),
    [
        (".", "out", "cannot be read"),
        ("none.toml", "out", "is missing"),
        ("plan.toml", "/dev/null/out", "cannot be used"),
        ("plan.toml", "/proc/nobody/out", "cannot be made"),
    ],
)
def test_train_says_in_words_what_it_cannot_use(tmp_path: Path, plan: str, out: str, words: str) -> None:
    (tmp_path / "plan.toml").write_bytes(plan_text(["a", "b", "c"]))
    home = tmp_path / "home"
    (home / "vault").mkdir(parents=True)
    (home / "vault" / "site.toml").write_text('site = "a"\n')
    options = ["--home", str(home), "--plan", str(tmp_path / plan), "--out", str(tmp_path / out)]
    done = run("train", *options)
    assert done.returncode == 1
    assert words in done.stderr
    assert "next: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_ingest_names_the_file_that_training_needs(tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    home = tmp_path / "home"
    words = ["ingest", "--home", str(home), "--site", "siteA", "--root", str(tmp_path / "archive"), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    json.loads(done.stdout)
    assert f"write {home / 'vault' / 'site.toml'}" in done.stderr
    (home / "vault" / "site.toml").write_text('site = "siteA"\n')
    assert "site.toml" not in CliRunner().invoke(app, words).stderr
