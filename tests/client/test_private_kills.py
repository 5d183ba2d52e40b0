"""Kill -9 of a trainer in private training: the ledger covers what was spent, and no entry is ever missing."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from rin.client import parallel
from rin.client.jobs import Jobs
from rin.client.ledger import site_ledger
from rin.client.private import rows_of
from rin.common import keys
from rin.common.accountant import ERROR, Row, bound, epsilon
from rin.common.files import read_json
from rin.common.layout import file_digest
from rin.common.ledger import debits
from rin.common.wire import Manifest, Request, from_bytes
from tests.client.private_lives import Life
from tests.private_consortium import POLICY, consortium, request_of
from tests.simulator import Consortium, quicken

STEPS: Final = 12
DELTA: Final = 1e-3
LONGEST: Final = 0.02  # seconds from a mark to a kill that comes at a random moment: several steps

# Where a trainer may die, by how far the request is; what takes longest more often.
FRESH: Final = ("began", "prepared", "snapshot", "debit", "allowed", "anchored", "appended", "charged")
PAID: Final = ("began", "prepared", "drew", "noise", "snapshot", "drew", "noise", "snapshot", "trained", "written")
LATE: Final = ("store", "stored", "publish", "published")
PHASES: Final = frozenset((*FRESH, *PAID, *LATE))


class Trainers:
    """The process that forks trainers, one a life."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.client.private_lives"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def live(self, life: Life) -> list[dict[str, Any]]:
        """All marks of one life; the last one says how it ended."""
        process = self._process
        assert process.stdin and process.stdout
        process.stdin.write(life.to_line())
        process.stdin.flush()
        said: list[dict[str, Any]] = []
        while not said or said[-1]["mark"] != "dead":
            said.append(json.loads(process.stdout.readline()))
        return said

    def close(self) -> None:
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0


@pytest.fixture(scope="module")
def trainers() -> Iterator[Trainers]:
    made = Trainers()
    yield made
    made.close()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Consortium:
    quicken(monkeypatch)
    policy = POLICY.replace("epsilon = 50.0", "epsilon = 500.0")
    return consortium(tmp_path, policy=policy, training={"rounds": 1000, "local_steps": STEPS})


@dataclass
class Witnessed:
    """What one attempt did, as its witness says: the mechanism of its steps, and how many steps its longest way has.

    Steps of a way that ended in a kill are taken again from the snapshot; only one of the ways can be released.
    """

    request: str
    drew: bool = False
    charged: bool = False
    sigma: float = 0.0
    rate: float = 0.0
    steps: int = 0


@dataclass
class Site:
    """One site under fire, and what must hold after each life."""

    trainers: Trainers
    made: Consortium
    fault: str = ""
    attempts: dict[str, Witnessed] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)  # digests of the entries, which only ever grow in number
    expected: Counter[str] = field(default_factory=Counter)  # debits a request
    released: dict[str, str] = field(default_factory=dict)  # request to update, once it was put out
    killed: Counter[str] = field(default_factory=Counter)  # by the last mark before the end

    def __post_init__(self) -> None:
        self.home = self.made.homes["siteA"]
        self.ledger, self.jobs = site_ledger(self.home), Jobs(self.home)
        self.first = request_of(self.made)

    def request(self, number: int) -> Request:
        found = self.first.model_copy(update={"round": number})
        self.expected.setdefault(found.id, 1)
        return found

    def live(self, request: Request, mark: str = "", nth: int = 1, delay: float = -1.0, *, lose: bool = False) -> bool:
        """One life; whether it was killed. With `lose` its snapshot is lost after it, if it has one."""
        life = Life(str(self.home.root), request.to_bytes().decode(), mark, nth, delay, self.fault)
        said = self.trainers.live(life)
        killed = said[-1]["killed"]
        assert killed or (said[-1]["status"], said[-2]["mark"]) == (0, "done"), said
        assert not [word for word in said if word["mark"] == "refused"]
        if killed:
            self.killed[said[-2]["mark"] if len(said) > 1 else "began"] += 1
        self.take_in(request.id, said)
        self.check(request, done=not killed)
        if lose:
            self.lose(request)
        return killed

    def take_in(self, request: str, said: list[dict[str, Any]]) -> None:
        """Add what a life's witness has seen."""
        step = 0
        for word in said:
            if not word.get("attempt"):
                continue
            seen = self.attempts.setdefault(word["attempt"], Witnessed(request))
            assert seen.request == request
            seen.charged |= word["mark"] == "charged"
            seen.drew |= word["mark"] == "drew"
            step = word.get("step", step) + (word["mark"] == "noise")
            seen.steps = max(seen.steps, step)
            if "sigma" in word:
                seen.sigma, seen.rate = word["sigma"], word["rate"]

    def check(self, request: Request, *, done: bool) -> None:
        """What must hold whenever a trainer has died or ended."""
        entries = self.ledger.entries()  # verified: chain, numbers, population, anchor
        digests = [entry.digest for entry in entries]
        assert digests[: len(self.heads)] == self.heads, "an entry is missing"
        self.heads = digests
        found = {debit.attempt: debit for debit in debits(entries)}
        assert len(found) == len(entries), "an attempt was debited twice"
        for attempt, seen in self.attempts.items():
            assert not (seen.drew or seen.charged) or attempt in found, "patients were drawn without a debit"
            if seen.drew:
                debit = found[attempt]
                paid, spent = (debit.sigma, -debit.rate, -debit.steps), (seen.sigma, -seen.rate, -seen.steps)
                assert debit.request == seen.request
                assert all(least <= used for least, used in zip(paid, spent, strict=True)), (
                    "less was debited than spent"
                )
        self._check_epsilon(rows_of(entries))
        self._check_released(request, done=done)

    def _check_epsilon(self, debited: list[Row]) -> None:
        assert bound(debited, DELTA) >= bound(self.spent(), DELTA)
        assert epsilon(debited, DELTA) >= epsilon(self.spent(), DELTA) - ERROR

    def spent(self) -> list[Row]:
        """What was spent, as the witness saw it."""
        return [Row(seen.sigma, seen.rate, seen.steps) for seen in self.attempts.values() if seen.steps]

    def _check_released(self, request: Request, *, done: bool) -> None:
        """One trajectory of a request leaves, for good, and what it claims is in the ledger."""
        put_out = self.home.outbox / f"{request.id}.safetensors"
        if put_out.exists():
            assert self.released.setdefault(request.id, file_digest(put_out)) == file_digest(put_out)
        if done:
            paper = keys.decode(read_json(put_out.with_suffix(".json"))["manifest"])
            assert paper is not None
            manifest = from_bytes(Manifest, paper)
            assert manifest.update == self.released[request.id]
            assert manifest.privacy is not None
            assert self.heads[manifest.privacy.ledger.count - 1] == manifest.privacy.ledger.digest
            charged = [debit for debit in debits(self.ledger.entries()) if debit.request == request.id]
            assert len(charged) == self.expected[request.id], "a request has not the debits that it must have"

    def stage(self, request: Request) -> tuple[str, ...]:
        """Where the next life may die; nowhere, if it is "" that is drawn."""
        if self.jobs.stored(request) is not None:
            return (*LATE[2:], "")
        paid = {debit.request for debit in debits(self.ledger.entries())}
        return (*PAID, *LATE) if request.id in paid else FRESH

    def lose(self, request: Request) -> None:
        """Delete the snapshot; where the trajectory that it belongs to was paid for, the next one costs anew."""
        snapshot = self.jobs.folder(request) / parallel.SNAPSHOT
        if snapshot.exists() and self.jobs.stored(request) is None:
            paid = {debit.attempt for debit in debits(self.ledger.entries())}
            of = [attempt for attempt, seen in self.attempts.items() if seen.request == request.id]
            self.expected[request.id] += of[-1] in paid
            snapshot.unlink()

    def finish(self) -> int:
        """What must hold when all requests are done; the number of debits."""
        lines = self.home.ledger.read_bytes().count(b"\n")
        assert lines == len(self.heads) == sum(self.expected.values())
        return lines


def test_a_kill_at_every_phase_of_a_round(trainers: Trainers, made: Consortium) -> None:
    site = Site(trainers, made)
    request = site.request(1)
    for mark in ("snapshot", "debit", "anchored"):
        assert site.live(request, mark)
    assert len(site.heads) == 1  # the last one was on its way, and counts
    assert site.live(request, "noise", 3, 0.002)
    assert site.live(request, "snapshot", 2, lose=True)  # while one is written; the one before it is lost too
    for mark in ("appended", "noise", "written", "store", "publish", "published"):
        assert site.live(request, mark)
    assert not site.live(request)
    assert [seen.steps for seen in site.attempts.values() if seen.charged][-1] == STEPS
    assert not site.live(site.request(2))
    assert site.finish() == 3
    assert site.killed.total() == 11


@pytest.mark.parametrize(
    ("fault", "kills", "words"),
    [
        ("late", ["noise"], "drawn without a debit"),
        ("free", ["noise"], "has not the debits"),
        ("weak", [], "less was debited"),
    ],
)
def test_a_debit_that_is_late_or_missing_or_small_is_found(
    trainers: Trainers, made: Consortium, fault: str, kills: list[str], words: str
) -> None:
    """The witness and the checks of the tests here would see it."""
    site = Site(trainers, made, fault)
    request = site.request(1)
    with pytest.raises(AssertionError, match=words):
        for mark in kills:
            assert site.live(request, mark, lose=True)
        site.live(request)


@pytest.mark.slow
def test_two_hundred_kills_spend_nothing_that_the_ledger_does_not_hold(trainers: Trainers, made: Consortium) -> None:
    site, rng, number = Site(trainers, made), random.Random(200), 0
    began, request = time.monotonic(), site.request(1)
    while site.killed.total() < 200:
        number += 1
        request, living = site.request(number), True
        while living and site.killed.total() < 200:
            stage = site.stage(request)
            fresh = [mark for mark in stage if mark and mark not in site.killed]  # each phase once, then any
            mark = rng.choice(fresh or stage)
            often = mark in ("drew", "noise", "snapshot")
            delay = -1.0 if fresh or rng.random() < 0.5 else rng.uniform(0, LONGEST)
            living = site.live(request, mark, rng.randint(1, 5) if often else 1, delay, lose=rng.random() < 0.15)
        if living:
            assert not site.live(request)
    spent, found = site.finish(), debits(site.ledger.entries())
    assert site.killed.keys() >= PHASES
    print(
        f"200 kills in {time.monotonic() - began:.0f} s: {number} requests, {spent} debits; epsilon on disk "
        f"{epsilon(rows_of(site.ledger.entries()), DELTA):.2f}, spent {epsilon(site.spent(), DELTA):.2f}; "
        f"{dict(site.killed.most_common())}"
    )
    assert spent == len(found) > number  # some snapshots were lost
    assert not site.live(request)  # whoever asks again is answered and pays nothing
    assert site.finish() == spent
