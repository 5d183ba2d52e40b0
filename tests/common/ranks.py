"""One of the processes that torchrun starts for tests/common/test_parallel.py: a round in float32, weights to a file.

`ranks.py OUT TARGET BATCH STOP` ends hard after STOP steps, if that is not 0.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from rin.common import fit, parallel
from rin.common.backbones import Network, initial
from rin.common.plan import Plan
from rin.common.snapshots import Snapshots
from tests.common.test_fit import CPU, ROWS, Stripes, plan


def plan_of(target: str, batch: int) -> Plan:
    """A plan in which no ReLU turns because its input is rounded otherwise; of seven seeds, with one that happens."""
    strategy = {"name": "fedprox", "mu": 0.1}
    return plan(strategy, {"target": target, "norm": "group"}, batch_size=batch, weight_decay=0.1, seed=1)


def train(
    p: Plan, ranks: parallel.Ranks | None, snapshots: Snapshots | None, stop: int
) -> tuple[Network, fit.FitResult]:
    """Three steps; in float32, since bf16 rounds a slice's sums otherwise than the whole batch's."""
    fit.half_precision = lambda device: False

    def progress(step: int, steps: int) -> None:
        if step == stop:
            os._exit(3)

    network = initial(p.model, 0)
    result = fit.fit_round(
        network,
        Stripes(30),
        p,
        rows=ROWS,
        exhaustive_rows=ROWS[:2],
        round=1,
        site="a",
        device=CPU,
        threads=1,
        progress=progress,
        snapshots=snapshots,
        ranks=ranks,
    )
    return network, result


def main() -> None:
    out, target, batch, stop = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    with parallel.joined("cpu") as (ranks, _):
        snapshots = Snapshots(out / "snapshot", "one", every=0.0, writes=ranks.leads)
        network, result = train(plan_of(target, batch), ranks, snapshots, stop)
        torch.save(network.state_dict(), out / f"{ranks.rank}.pt")
        (out / f"{ranks.rank}.json").write_text(json.dumps(result.metrics))


if __name__ == "__main__":
    main()
