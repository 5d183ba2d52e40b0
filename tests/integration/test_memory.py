"""What the processes of a consortium hold: an idle agent is small, and a hundred rounds leave nothing behind.

Two sites, real processes over TLS; about ten minutes on two cores. The figures are printed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import pytest

from tests.benchmarks import meter
from tests.consortium import Consortium, ingest_phantom, wait_for

pytestmark = pytest.mark.slow

ROUNDS: Final = 100
SETTLED: Final = 20  # rounds after which caches and pools have their size
IDLE_MB: Final = 300.0
GROWTH: Final = 1.03  # of the settled size; and a page pool of allocators
SLACK_MB: Final = 4.0

# Command line to the name in the table. A ClientApp lives for one message and has nothing to grow in.
NAMES: Final = {
    r"rin\.client\.cli start": "agent: supervisor",
    r"rin\.client\.airlock": "trainer",
    r"run_supernode": "agent: SuperNode",
    r"rin\.server\.cli run": "coordinator: supervisor",
    r"rin\.server\.gateway": "gateway",
    r"flower-superlink": "SuperLink",
    r"run_guarded_serverapp|flwr-serverapp": "rounds",
    r"superexec": "SuperExec",
}


def memory_mb(pid: int, kind: str) -> float:
    """`kind` of /proc/PID/status in MB (10^6 bytes); 0 if the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{kind}:")), 0.0)


def footprint_mb(pids: Iterable[int]) -> float:
    """What processes take together in MB: private memory of each, and what they map of files once."""
    private, mapped = 0, dict[str, int]()
    for pid in pids:
        place, resident = "", 0
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            key, _, rest = line.partition(" ")
            if not key.endswith(":"):  # the head of a mapping: address, mode, offset, device, inode, path
                place, resident = " ".join(rest.split()[1:]), 0
            elif key == "Rss:":
                resident = int(rest.split()[0])
            elif key == "Anonymous:":
                private += (anonymous := int(rest.split()[0]))
                mapped[place] = max(mapped.get(place, 0), resident - anonymous)
    return (private + sum(mapped.values())) * 1024 / 1e6


def held(*roots: int, kind: str = "RssAnon") -> dict[tuple[int, str], float]:
    """Memory of the named processes below `roots`, by pid and name: private, without mapped files, unless said."""
    found = [process for root in roots for process in [meter.Process(root, 0, 0.0, _command(root)), *meter.tree(root)]]
    return {(p.pid, name): memory_mb(p.pid, kind) for p in found if (name := _name(p.command))}


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def _name(command: str) -> str:
    return next((name for pattern, name in NAMES.items() if re.search(pattern, command)), "")


def test_an_idle_agent_is_small_and_a_hundred_rounds_leave_nothing_behind(tmp_path: Path) -> None:
    this = Consortium(tmp_path, ingest_phantom(tmp_path), rounds=ROUNDS, steps=1)
    with this.coordinator() as coordinator, this.agent("north") as north:
        wait_for(lambda: "agent: SuperNode" in _named(held(north.pid)), seconds=240, what="the agent's processes")
        time.sleep(20)  # nothing happens before both sites are there
        resident = held(north.pid, kind="VmRSS")
        agent = footprint_mb(pid for pid, name in resident if name != "trainer")
        sizes: list[dict[tuple[int, str], float]] = []
        with this.agent("south") as south:
            while coordinator.poll() is None:
                if _closed(this) > len(sizes):
                    sizes.append(held(coordinator.pid, north.pid, south.pid))
                time.sleep(0.2)
        assert coordinator.returncode == 0, this.logs()
    early, late = (_largest(sizes[a:b]) for a, b in ((SETTLED, SETTLED + 10), (-12, -2)))
    figures = {"resident": _named(resident), "agent": round(agent, 1), "early": _named(early), "late": _named(late)}
    print(json.dumps(figures, indent=1))  # MB
    assert agent <= IDLE_MB
    assert len(sizes) > 0.9 * ROUNDS
    assert {"agent: supervisor", "trainer", "agent: SuperNode", "gateway", "SuperLink", "rounds"} <= set(_named(late))
    grown = {key: (early[key], late[key]) for key in early if late.get(key, 0.0) > GROWTH * early[key] + SLACK_MB}
    assert not grown
    assert early.keys() == late.keys(), "a process was replaced on the way"


def _closed(this: Consortium) -> int:
    return sum(record["state"] == "closed" for record in this.records())


def _largest(sizes: list[dict[tuple[int, str], float]]) -> dict[tuple[int, str], float]:
    keys = set.intersection(*(set(each) for each in sizes))
    return {key: max(each[key] for each in sizes) for key in keys}


def _named(sizes: dict[tuple[int, str], float]) -> dict[str, float]:
    return {name: round(size, 1) for (_, name), size in sorted(sizes.items(), key=lambda item: item[0][1])}
