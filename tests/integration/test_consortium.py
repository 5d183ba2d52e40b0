"""The whole of it over TLS with real processes, and kill -9 at a seeded moment: the same bits as undisturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rin.client.home import Home
from rin.common.events import read_events
from tests.benchmarks import meter
from tests.consortium import Consortium, ingest_phantom, wait_for

ROUND_S = 240  # far more than a round needs on a loaded machine


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return ingest_phantom(tmp_path_factory.mktemp("phantom"))


def finish(this: Consortium, disturb: Callable[[Consortium, int], None] | None = None) -> None:
    """Run `this` to its last round; `disturb` gets the coordinator's pid and may kill what it likes."""
    with this.agents():
        with this.coordinator() as coordinator:
            if disturb is not None:
                disturb(this, coordinator.pid)
            code = coordinator.wait(ROUND_S * this.rounds) if coordinator.poll() is None else coordinator.returncode
        if code == -signal.SIGKILL:
            with this.coordinator() as again:
                code = again.wait(ROUND_S * this.rounds)
    assert code == 0, this.logs()


@pytest.fixture(scope="module")
def undisturbed(phantom: Home, tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    this = Consortium(tmp_path_factory.mktemp("undisturbed"), phantom)
    finish(this)
    return this


def events(this: Consortium) -> list[str]:
    return [event.kind for event in read_events(this.run.log / "events.jsonl")[0]]


def copy_of(this: Consortium, folder: Path, phantom: Home) -> Consortium:
    """A second consortium in which every draw and every image is the same."""
    return Consortium(folder, phantom, sites=this.sites, rounds=this.rounds, steps=this.steps)


def test_rounds_over_tls_end_with_every_site_in_every_round(undisturbed: Consortium) -> None:
    records = undisturbed.records()
    assert [record["state"] for record in records] == ["closed"] * undisturbed.rounds
    assert all(set(record["receipts"]) == set(undisturbed.sites) for record in records)
    assert undisturbed.run.checkpoint(undisturbed.rounds).is_file()


def test_nothing_is_left_running(undisturbed: Consortium) -> None:
    folder = str(undisturbed.folder)
    wait_for(lambda: not [p for p in meter.tree(1) if folder in p.command], seconds=20, what="processes stayed")


def kill_coordinator(this: Consortium, pid: int) -> None:
    """At a seeded moment of the second round."""
    wait_for(lambda: events(this).count("round-opened") == 2, seconds=ROUND_S, what=f"round 2\n{this.logs()}")
    time.sleep(random.Random(1).uniform(0.0, 4.0))
    os.kill(pid, signal.SIGKILL)
    time.sleep(1.0)


def kill_at_site(pattern: str) -> Callable[[Consortium, int], None]:
    """Kill the first process of a site whose command holds `pattern`, once it works on a round."""

    def disturb(this: Consortium, pid: int) -> None:
        mine = str(this.home(this.sites[0]).root)

        def victims() -> list[int]:
            sent = "request-sent" in events(this)
            return [p.pid for p in meter.tree() if sent and pattern in p.command and _of(p.pid, mine)]

        os.kill(wait_for(victims, seconds=ROUND_S, what=f"{pattern}\n{this.logs()}")[0], signal.SIGKILL)

    return disturb


def _of(pid: int, home: str) -> bool:
    """Whether process `pid` works for the site at `home`."""
    try:
        return home.encode() in Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(kill_coordinator, id="coordinator"),
        pytest.param(kill_at_site("rin.client.airlock"), id="trainer", marks=pytest.mark.slow),
    ],
)
def test_kill_9_leaves_the_same_weights(
    disturb: Callable[[Consortium, int], None], undisturbed: Consortium, phantom: Home, tmp_path: Path
) -> None:
    this = copy_of(undisturbed, tmp_path, phantom)
    finish(this, disturb)
    assert this.weights() == undisturbed.weights()


@pytest.mark.slow
def test_kill_9_of_a_clientapp_leaves_the_same_weights(undisturbed: Consortium, phantom: Home, tmp_path: Path) -> None:
    this = copy_of(undisturbed, tmp_path, phantom)
    finish(this, kill_at_site("run_guarded_clientapp"))
    assert this.weights() == undisturbed.weights()
