"""`rin-server run` with its real children and no site: kill -9 of any of them, admission and revocation meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rin.common import keys
from rin.common.events import read_events
from rin.common.files import read_json
from rin.common.labels import label_set_digest
from rin.server import consortium, members, superlink
from rin.server.rundir import RunDir

PLAN = f"""
protocol = 1
name = "no site"
label-set = "{label_set_digest()}"
[sites]
siteA = 1.0
siteB = 1.0
[model]
backbone = "resnet18"
image-size = 32
[training]
rounds = 2
local-steps = 8
batch-size = 8
[limits]
min-sites = 1
quorum = 1
"""


def until(condition: Callable[[], Any], seconds: float = 90.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)
    return value


def admit(run: RunDir, site: str, digit: str) -> None:
    members.register(run, site, node_key=keys.node_public(keys.make_node_key()), signing_key=digit * 64)


def kinds(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [event.fields for event in read_events(run.log / "events.jsonl")[0] if event.kind == kind]


def processes(run: RunDir) -> dict[int, str]:
    """Pid to command line of everything that works on `run`, the coordinator itself left out."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                mine = f"RIN_RUN={run.root}".encode() in (entry / "environ").read_bytes().split(b"\0")
                if line and (mine or ("gateway" in line and str(run.root) in line)):
                    found[int(entry.name)] = line
    return found


def pid_of(run: RunDir, word: str) -> int | None:
    return next((pid for pid, line in processes(run).items() if word in line), None)


class Coordinator:
    """One start of `rin-server run` after the other."""

    def __init__(self, run: RunDir, port: int, out: Path) -> None:
        self.run, self.port, self.out = run, port, out
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "rin.server.cli", "run", "--run", str(self.run.root)]
        with self.out.open("ab") as out:
            self.process = subprocess.Popen(
                [*argv, "--host", "127.0.0.1", "--port", str(self.port)], stdout=out, stderr=subprocess.STDOUT
            )
        return self.process


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    run, port = RunDir(tmp_path / "run"), superlink.free_port()
    consortium.init(run, plan=PLAN.encode(), address=f"https://localhost:{port}")
    this = Coordinator(run, port, tmp_path / "out.txt")
    yield this
    if this.process is not None and this.process.poll() is None:
        this.process.kill()
        this.process.wait()


@pytest.mark.slow
def test_the_coordinator_goes_on_after_kill_9_of_itself_and_of_each_child(coordinator: Coordinator) -> None:
    run = coordinator.run
    first = coordinator.start()
    until(lambda: "a round needs 1 members" in coordinator.out.read_text())
    assert not kinds(run, "flower-run")  # nobody is admitted yet: nothing to run
    admit(run, "siteA", "a")
    until(lambda: kinds(run, "round-opened"))
    assert kinds(run, "member-admitted") == [{"site": "siteA"}]
    assert kinds(run, "round-opened") == [{"round": 1, "sites": ["siteA"]}]

    # The coordinator itself: the kernel ends all that it started.
    assert len(processes(run)) == 4
    first.kill()
    first.wait()
    until(lambda: not processes(run), 10)
    second = coordinator.start()
    until(lambda: kinds(run, "run-resumed"))
    assert read_json(run.facts)["epoch"] == 2

    # The ServerApp: its rounds are submitted again, without waiting for Flower's 40 s.
    os.kill(pid_of(run, "run_guarded_serverapp") or 0, signal.SIGKILL)
    began = time.monotonic()
    until(lambda: len(kinds(run, "flower-run")) >= 4)  # submitted; submitted, ended, submitted
    assert time.monotonic() - began < 20
    until(lambda: len(kinds(run, "run-resumed")) == 2)

    # The SuperLink: it forgets all, and is told all again.
    node = superlink.read_nodes(run)["siteA"]
    os.kill(pid_of(run, "flower-superlink") or 0, signal.SIGKILL)
    until(lambda: len(kinds(run, "run-resumed")) == 3)
    assert superlink.read_nodes(run)["siteA"] != node

    # Members come and go while it runs.
    admit(run, "siteB", "b")
    until(lambda: set(superlink.read_nodes(run)) == {"siteA", "siteB"}, 20)
    consortium.revoke(run, "siteB")
    until(lambda: set(superlink.read_nodes(run)) == {"siteA"}, 20)
    assert kinds(run, "member-revoked") == [{"site": "siteB"}]

    # A stop is quick and leaves nothing.
    second.send_signal(signal.SIGTERM)
    assert second.wait(20) == 143
    assert not processes(run)
    assert "the same command goes on from here" in coordinator.out.read_text()
