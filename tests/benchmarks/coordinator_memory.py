"""Peak memory of every coordinator process with 3 and with 10 sites of ResNet50's size.

    python -m tests.benchmarks.coordinator_memory

VmHWM over two rounds of real processes over TLS; it should not grow with the number of sites. Expect ten minutes.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from pathlib import Path

from rin.client.home import Home
from rin.common.plan import read_plan
from rin.server.run import finished
from tests.benchmarks import meter
from tests.consortium import Consortium, ingest_phantom

# Command line to the name in the table.
NAMES = {
    r"rin\.server\.gateway": "gateway",
    r"flower-superlink": "SuperLink",
    r"run_guarded_serverapp|flwr-serverapp": "rounds (flwr-serverapp)",
    r"superexec": "SuperExec",
    r"rin\.server\.cli run": "supervisor",
}


def peaks(folder: Path, phantom: Home, sites: int) -> dict[str, float]:
    """Largest VmHWM in MB of each kind of coordinator process."""
    names = tuple(f"site{number}" for number in range(sites))
    this = Consortium(folder, phantom, sites=names, backbone="resnet50", rounds=2, steps=1)
    found: dict[str, float] = {}
    with this.coordinator() as coordinator, this.agents():
        while coordinator.poll() is None:
            mine = [
                meter.Process(coordinator.pid, os.getpid(), 0.0, "rin.server.cli run"),
                *meter.tree(coordinator.pid),
            ]
            for process in mine:
                name = next((name for pattern, name in NAMES.items() if re.search(pattern, process.command)), "")
                if name:
                    found[name] = max(found.get(name, 0.0), meter.peak_mb(process.pid))
            time.sleep(0.2)
    if not finished(this.run, read_plan(this.run.plan)[0]):
        raise RuntimeError(f"the rounds did not end\n{this.logs()}")
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        phantom = ingest_phantom(Path(folder))
        few, many = (peaks(Path(folder) / str(sites), phantom, sites) for sites in (3, 10))
    print("| process | 3 sites, MB | 10 sites, MB | growth |\n|---|---|---|---|")
    for name in sorted(few):
        print(f"| {name} | {few[name]:.0f} | {many[name]:.0f} | {many[name] / few[name] - 1:+.1%} |")


if __name__ == "__main__":
    main()
