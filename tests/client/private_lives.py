"""A trainer in private training that dies: one process imports all, forks one trainer a life, and kills it -9.

`python -m tests.client.private_lives` reads a line of JSON a life (`Life`) and prints one for each mark that the life
comes by, then `{"mark": "dead"}` with how it ended. A mark is written to a pipe before what it names begins, so what
is printed outlives the trainer: it is a witness of what the trainer did, apart from all that it writes itself.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from rin.client import jobs, private, trainer
from rin.client.home import Home
from rin.common import backbones, ledger, snapshots, weights
from rin.common import private as steps
from rin.common.errors import RefusedError
from rin.common.wire import Request, from_bytes
from tests.simulator import TINY

EVERY: Final = 0.01  # seconds between two snapshots: one every few steps
FOREVER: Final = 600.0
# What a first round imports on its way; each life would do it again.
LATE: Final = ("opacus.validators", "rin.common.accountant", "rin.client.data", "rin.client.validation")

# What a life comes by, in order: whose attribute it is, and what is said before it is called and after it.
MARKS: Final[tuple[tuple[Any, str, str, str], ...]] = (
    (trainer, "take_in", "began", ""),
    (steps, "settle", "prepared", ""),
    (weights, "save_file", "snapshot", ""),
    (ledger.Ledger, "debit", "debit", ""),
    (ledger.Ledger, "_append", "allowed", ""),
    (ledger.Ledger, "_write", "anchored", "appended"),
    (steps.Sampler, "step", "drew", ""),
    (steps.PatientGradients, "settle", "noise", ""),
    (weights, "write_update", "trained", "written"),
    (jobs.Jobs, "store", "store", "stored"),
    (trainer, "put_out", "publish", "published"),
)


@dataclass(frozen=True, slots=True)
class Life:
    """One life of a trainer.

    Attributes:
        request: the request's bytes as text.
        mark: which mark it dies at, the `nth` of them; empty: it lives.
        delay: seconds from the mark to the kill; negative: it waits there for its end.
        fault: a defect that is put in, see `FAULTS`.
    """

    home: str
    request: str
    mark: str = ""
    nth: int = 1
    delay: float = 0.0
    fault: str = ""

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


class Witness:
    """Says in the trainer's process what it is about to do."""

    def __init__(self, out: int, life: Life) -> None:
        self._out, self._life, self._seen = out, life, 0
        self.attempt = ""

    def say(self, mark: str, **facts: Any) -> None:
        os.write(self._out, json.dumps({"mark": mark, "attempt": self.attempt, **facts}).encode() + b"\n")
        self._seen += mark == self._life.mark
        if mark == self._life.mark and self._seen == self._life.nth and self._life.delay < 0:
            time.sleep(FOREVER)

    def watch(self, owner: Any, name: str, before: str, after: str) -> None:
        """Have the marks said around each call of `owner.name`."""
        real = getattr(owner, name)

        @functools.wraps(real)
        def said(*args: Any, **options: Any) -> Any:
            self.say(before, **_facts(before, args))
            result = real(*args, **options)
            if after:
                self.say(after)
            return result

        setattr(owner, name, said)

    def attend(self) -> None:
        """Watch the whole round."""
        for row in MARKS:
            self.watch(*row)
        trained, resume = steps.fit_private, snapshots.Snapshots.resume

        def fit_private(*args: Any, charge: Callable[[], None], **options: Any) -> int:
            self.attempt = options["snapshots"]._name.split()[1]

            def charged() -> None:
                charge()
                self.say("charged")

            return trained(*args, charge=charged, **options)

        def resumed(kept: snapshots.Snapshots, held: snapshots.Held) -> int:
            first = resume(kept, held)
            self.say("resumed", step=first)
            return first

        steps.fit_private, snapshots.Snapshots.resume = fit_private, resumed  # type: ignore[method-assign]


def _facts(mark: str, args: tuple[Any, ...]) -> dict[str, Any]:
    """The noise and sampling that are really used."""
    if mark not in ("drew", "noise"):
        return {}
    mechanism = args[0]._mechanism
    return {"sigma": mechanism.sigma, "rate": mechanism.rate}


# --- defects, to see that they are found ------------------------------------------------------------------------


def late() -> None:
    """The debit comes after the first step."""
    real = steps.fit_private

    def fit_private(
        *args: Any, charge: Callable[[], None], progress: Callable[[int, int], None], **options: Any
    ) -> int:
        def after(step: int, of: int) -> None:
            charge()
            progress(step, of)

        return real(*args, charge=lambda: None, progress=after, **options)

    steps.fit_private = fit_private


def free() -> None:
    """A round whose snapshot was lost begins anew inside its old debit."""
    private.secrets.token_hex = lambda nbytes=None: "0" * 2 * (nbytes or 16)


def weak() -> None:
    """What is debited is a quieter mechanism than the one that is used."""
    real = private.mechanism_of
    private.mechanism_of = lambda plan, site: replace(real(plan, site), sigma=0.5)


FAULTS: Final[dict[str, Callable[[], None]]] = {"": lambda: None, "late": late, "free": free, "weak": weak}

# --- lives ------------------------------------------------------------------------------------------------------


def live(life: Life, out: int) -> None:
    """One life of a trainer, in its own process."""
    snapshots.EVERY, snapshots.SHARE = EVERY, 1.0  # type: ignore[misc]
    FAULTS[life.fault]()
    witness = Witness(out, life)
    witness.attend()
    home, request = Home(Path(life.home)), from_bytes(Request, life.request.encode())
    plan = (home.accepted / f"{request.plan}.toml").read_bytes()
    try:
        trainer.Trainer(home).train(request, plan, lambda progress: None, lambda: "")
    except RefusedError as error:
        witness.say("refused", code=error.code)
    witness.say("done")


def follow(pid: int, life: Life, source: int) -> None:
    """Pass on what the life says, and kill it when its mark has come."""
    left = life.nth
    with os.fdopen(source) as lines:
        for line in lines:
            sys.stdout.write(line)
            if json.loads(line)["mark"] == life.mark:
                left -= 1
                if left == 0:
                    time.sleep(max(0.0, life.delay))
                    os.kill(pid, signal.SIGKILL)


def main() -> None:
    backbones.BACKBONES["resnet18"] = TINY
    trainer.warm_up()
    for name in LATE:
        importlib.import_module(name)
    for line in sys.stdin:
        life = Life(**json.loads(line))
        source, out = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(source)
            live(life, out)
            os._exit(0)
        os.close(out)
        follow(pid, life, source)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"mark": "dead", "killed": os.WIFSIGNALED(status), "status": status}), flush=True)


if __name__ == "__main__":
    main()
