"""What it costs to account for a history of N different runs: `python -m tests.benchmarks.accounting`."""

from __future__ import annotations

import logging
import time

from rin.common.accountant import Row, bound, epsilon

DELTA = 1e-5


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    print("| runs | epsilon | CPU-s | Renyi bound | CPU-s |")
    print("|---|---|---|---|---|")
    for runs in (1, 5, 10, 20, 40):
        # Nothing is remembered from the histories before: each has rates of its own.
        history = [Row(1.0 + 0.03 * run, 0.02 + 0.001 * run + 1e-5 * runs, 200) for run in range(runs)]
        started = time.process_time()
        fast = bound(history, DELTA)
        between = time.process_time()
        best = epsilon(history, DELTA)
        ended = time.process_time()
        print(f"| {runs} | {best:.2f} | {ended - between:.2f} | {fast:.2f} | {between - started:.2f} |")


if __name__ == "__main__":
    main()
