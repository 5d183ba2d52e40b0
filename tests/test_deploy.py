"""The files that hospital IT copies: they parse, they explain every key, systemd and nginx take them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rin.client.site import Site
from rin.common.plan import Plan, parse_plan
from rin.common.settings import Table, parse_toml

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"


def keys(model: type[Table], prefix: str = "") -> set[str]:
    """Every key of a model, nested ones as `table.key`."""
    found = set()
    for name, field in model.model_fields.items():
        alias = field.alias or name
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, Table):
            found |= keys(nested, f"{alias}.")
        else:
            found.add(prefix + alias)
    return found


def explained(text: str) -> set[str]:
    """Every key that the file shows, commented out or not."""
    found, table = set(), ""
    for line in text.splitlines():
        if heading := re.match(r"\[([a-z-]+)\]", line):
            table = heading[1] + "."
            found.add(heading[1])
        elif key := re.match(r"(?:# )?([a-z][a-z0-9-]*) = ", line):
            found.add(table + key[1])
    return found


@pytest.mark.parametrize(("file", "model"), [("plan.example.toml", Plan), ("site.example.toml", Site)])
def test_examples_show_every_key(file: str, model: type[Table]) -> None:
    assert keys(model) <= explained((DEPLOY / file).read_text(encoding="utf-8"))


def test_example_plan_parses() -> None:
    assert parse_plan((DEPLOY / "plan.example.toml").read_bytes()).training.rounds == 100


def test_example_site_parses_with_every_optional_key_too() -> None:
    text = (DEPLOY / "site.example.toml").read_text(encoding="utf-8")
    assert parse_toml(text, Site, name="site.example.toml").policy.privacy == "required"
    everything = re.sub(r"^# (?=[a-z-]+ = )", "", text, flags=re.MULTILINE)
    assert parse_toml(everything, Site, name="site.example.toml").device.memory_gib == 16.0


@pytest.mark.parametrize("unit", sorted((DEPLOY / "systemd").glob("*.service")), ids=lambda path: path.name)
def test_systemd_takes_the_units(unit: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on this machine")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, sorted(unit.parent.glob("*.service")))],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
        check=False,
    )
    assert [line for line in done.stderr.splitlines() if "rin-" in line] == []


def test_the_airlock_of_the_units() -> None:
    trainer = (DEPLOY / "systemd" / "rin-trainer.service").read_text(encoding="utf-8")
    agent = (DEPLOY / "systemd" / "rin-agent.service").read_text(encoding="utf-8")
    assert "PrivateNetwork=yes" in trainer
    assert "InaccessiblePaths=/var/lib/rin/vault" in agent
    assert "InaccessiblePaths=-/archive" in agent
    users = [re.search(r"^User=(.+)$", text, re.MULTILINE) for text in (trainer, agent)]
    assert len({user[1] for user in users if user}) == 2


def test_nginx_takes_its_example(tmp_path: Path) -> None:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not on this machine")
    text = (DEPLOY / "nginx.example.conf").read_text(encoding="utf-8")
    text = re.sub(r"^\s*(ssl_certificate|ssl_certificate_key|proxy_ssl_trusted_certificate) .*$", "", text, flags=re.M)
    text = text.replace("listen 443 ssl;", "listen 127.0.0.1:8444;").replace("proxy_ssl_verify on;", "")
    config = tmp_path / "nginx.conf"
    config.write_text(f"pid {tmp_path}/nginx.pid;\nerror_log {tmp_path}/error.log;\nevents {{}}\nhttp {{\n{text}\n}}\n")
    done = subprocess.run(["nginx", "-t", "-c", str(config)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
