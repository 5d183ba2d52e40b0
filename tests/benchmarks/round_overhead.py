"""What a round costs beside training: rin against stock Flower FedAvg, same machine, same run.

    python -m tests.benchmarks.round_overhead

Three sites, ResNet50 with a head of 165 labels (23.8 M parameters, 95.5 MB), TLS and node keys, real processes, and the
same work at a site: one SGD step on eight images of 32 pixels, since a round of rin without any is refused. Each round
but the first counts. Expect five minutes.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from pathlib import Path

from rin.common.events import read_events
from tests.benchmarks import meter, stock_flower
from tests.consortium import Consortium, free_port, ingest_phantom

SITES, ROUNDS = 3, 4


def rin(folder: Path) -> list[tuple[float, float]]:
    """(wall seconds, CPU seconds) of each round of rin but the first."""
    names = tuple(f"site{number}" for number in range(SITES))
    this = Consortium(folder, ingest_phantom(folder), sites=names, backbone="resnet50", rounds=ROUNDS, steps=1)
    points: list[tuple[float, float]] = []
    with this.coordinator() as coordinator, this.agents():
        while len(points) < ROUNDS and coordinator.poll() is None:
            events, _ = read_events(this.run.log / "events.jsonl")
            if sum(event.kind == "round-closed" for event in events) > len(points):
                points.append((time.time(), meter.cpu_seconds()))
            time.sleep(0.1)
    if len(points) < ROUNDS:
        raise RuntimeError(f"rin ended after {len(points)} rounds\n{this.logs()}")
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(points)]


def main() -> None:
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        mine = rin(Path(ours))
        ports = [free_port() for _ in range(SITES + 1)]
        stock = stock_flower.run(Path(theirs), sites=SITES, rounds=ROUNDS, ports=ports)
    print("| | wall s a round | CPU-s a round |\n|---|---|---|")
    medians = []
    for name, rounds in (("rin", mine), ("stock Flower FedAvg", stock)):
        wall, cpu = (statistics.median(values) for values in zip(*rounds, strict=True))
        medians.append((wall, cpu))
        print(f"| {name} | {wall:.1f} ({min(r[0] for r in rounds):.1f}-{max(r[0] for r in rounds):.1f}) | {cpu:.1f} |")
    print(f"| ratio | {medians[0][0] / medians[1][0]:.2f} | {medians[0][1] / medians[1][1]:.2f} |")


if __name__ == "__main__":
    main()
