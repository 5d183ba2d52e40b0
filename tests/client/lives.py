"""A trainer that dies: one process imports what a round needs and forks a trainer a life, to be killed -9 at a step.

`python -m tests.client.lives` reads lines `{"home": ..., "request": ..., "kills": [step, ...]}`, trains each request to
its end, and prints a line a life: home, round, the first step that it took, the step of its kill (0: it lived).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rin.client.home import Home
from rin.client.trainer import Progress, Trainer, warm_up
from rin.common import snapshots
from rin.common.wire import Request, from_bytes

EVERY = 0.1  # seconds between two snapshots: a few steps
LONGEST = 0.1  # seconds between a step and its kill, which so may come in the middle of anything


def live(home: Home, request: Request, plan: bytes, out: int) -> None:
    """One life of a trainer; every step is a line."""
    snapshots.EVERY, snapshots.SHARE = EVERY, 1.0

    def progress(at: Progress) -> None:
        os.write(out, b"%d\n" % at.step)

    Trainer(home).train(request, plan, progress, lambda: "")


def watch(pid: int, steps: Sequence[int], source: int, rng: random.Random) -> tuple[int, int]:
    """Follow one life, which ends at the first of `steps` (sorted) that it reaches; (its first step, the last one)."""
    first = at = 0
    with os.fdopen(source) as lines:
        for line in lines:
            at = int(line)
            first = first or at
            if steps and at >= steps[0]:
                time.sleep(rng.uniform(0, LONGEST))
                os.kill(pid, signal.SIGKILL)
                return first, at
    return first, 0


def train(home: Home, request: Request, plan: bytes, kills: Sequence[int], rng: random.Random) -> None:
    """Train one request to its end, whatever it takes."""
    left = sorted(kills)
    while True:
        source, out = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(source)
            live(home, request, plan, out)
            os._exit(0)
        os.close(out)
        first, killed = watch(pid, left, source, rng)
        _, status = os.waitpid(pid, 0)
        died = os.WIFSIGNALED(status)
        facts = {"home": home.root.name, "round": request.round, "first": first, "killed": killed if died else 0}
        print(json.dumps(facts), flush=True)
        left = left[1:]  # one may have ended before its kill came
        if not died:
            if status:
                raise SystemExit("a trainer failed")
            return


def main() -> None:
    warm_up()
    rng = random.Random(0)
    for line in sys.stdin:
        order = json.loads(line)
        home, request = Home(Path(order["home"])), from_bytes(Request, order["request"].encode())
        train(home, request, (home.accepted / f"{request.plan}.toml").read_bytes(), order["kills"], rng)


if __name__ == "__main__":
    main()
