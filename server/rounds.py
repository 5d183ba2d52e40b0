"""The round loop: open, collect receipts, freeze, aggregate, close; round.json is its memory, it may die anywhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rin.common import statement
from rin.common.errors import CODES, RefusedError, StateError
from rin.common.events import Events
from rin.common.files import read_json
from rin.common.labels import label_set
from rin.common.layout import NOTHING, Layout
from rin.common.plan import Plan, plan_digest, read_plan
from rin.common.scores import GroupScores, fault
from rin.common.wire import Manifest, Request
from rin.server import checkpoints, members, receipts, tickets
from rin.server.aggregate import Contribution, clip_scale, frozen_rows, inspect, mean_update
from rin.server.port import LOST, Answer, Port, signed_head
from rin.server.receipts import Receipt
from rin.server.record import FOLLOWS, Counted, Failure, Record, last_record, read_record, write_record
from rin.server.rundir import RunDir
from rin.server.strategies import advance
from rin.server.validation import Validation, summed

log = logging.getLogger(__name__)

POLL_S: Final = 0.2  # between two looks at the receipts on disk
PORT_S: Final = 1.0  # between two questions to the port, each of which may cost a request
LONGEST_S: Final = 2.0  # both grow to this while a round takes long
PAUSE_S: Final = 0.5  # before the same site is asked again; doubled each time
LONGEST_PAUSE_S: Final = 60.0
SAVE_S: Final = 30.0  # how much of the deadline a crash may forget


def run(run: RunDir, port: Port, *, epoch: int) -> None:
    """Run the plan's rounds from where they are to their end.

    Args:
        epoch: of the coordinator that started this loop, as in run.json; a later one there ends this loop.

    Raises:
        StateError: a round failed, the plan was edited, files are damaged, or a later coordinator has taken over.
    """
    plan, data = read_plan(run.plan)
    digest = plan_digest(data)
    layout = checkpoints.begin(run, plan, digest)
    loop = _Loop(run, port, epoch, plan, data, digest, layout, read_json(run.facts)["run"])
    loop.main()


# What is done in each state; each gives the record of the next one.
ACTIONS: Final[dict[str, Callable[[_Loop, Record], Record]]] = {
    "open": lambda loop, record: loop.collect(record),
    "frozen": lambda loop, record: loop.aggregate(record),
    "failed": lambda loop, record: loop.reopen(record),
}


@dataclass(slots=True)
class _Asked:
    """What this process knows of a site in the open round. `due`: when it may be asked (again)."""

    due: float = 0.0
    waiting: bool = False  # a request is on its way or worked on
    away: bool = False  # it was out of reach meanwhile
    pause: float = PAUSE_S

    def again(self, now: float) -> None:
        """To be asked again after a pause that grows."""
        self.waiting, self.due = False, now + self.pause
        self.pause = min(2 * self.pause, LONGEST_PAUSE_S)


@dataclass(slots=True)
class _Loop:
    """One coordinator's work on one run. Times are of `time.monotonic`."""

    run: RunDir
    port: Port
    epoch: int
    plan: Plan
    data: bytes
    digest: str
    layout: Layout
    run_id: str
    asked: dict[str, _Asked] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)  # the open round's start, less what it had before
    next_port: float = 0.0
    next_save: float = 0.0

    @property
    def events(self) -> Events:
        return Events(self.run.log / "events.jsonl")

    def main(self) -> None:
        """One state after the other until the last round is closed."""
        record = last_record(self.run)
        if record is not None:
            self.events.add("run-resumed", round=record.round)
        while record is None or record.state != "closed" or record.round < self.plan.last_round:
            if record is None or record.state == "closed":
                if record is not None:
                    self.tidy(record)
                record = self.open(record)
            self.began = time.monotonic() - record.seconds
            while record.state != "closed":
                record = ACTIONS[record.state](self, record)
        self.tidy(record)
        self.events.add("run-finished", rounds=self.plan.training.rounds)

    def write(self, record: Record) -> Record:
        """Make `record` the round's, unless a later coordinator has taken over."""
        self.check_epoch()
        now = read_record(self.run, record.round)
        if now is not None and record.state not in FOLLOWS[now.state]:
            raise StateError(f"round {record.round} is {now.state} and cannot become {record.state}")
        record = record.with_(seconds=time.monotonic() - self.began)
        write_record(self.run, record)
        return record

    def check_epoch(self) -> None:
        if read_json(self.run.facts)["epoch"] > self.epoch:
            raise StateError("a later coordinator works on this run", step="nothing to do: this one stops")

    def open(self, last: Record | None) -> Record:
        """The next round, with the members of today as its cohort."""
        number = last.round + 1 if last else 1
        cohort = tuple(sorted(set(self.plan.sites) & set(members.members(self.run))))
        if len(cohort) < self.wanted(number):
            raise StateError(
                f"round {number} needs {self.plan.limits.quorum} sites and {len(cohort)} are admitted",
                step="admit the others with `rin-server admit`, or agree on a plan with a lower quorum",
            )
        base = last.weights if last else checkpoints.digest_of(self.run, 0)
        self.began = time.monotonic()
        record = Record(round=number, state="open", plan=self.digest, base=base, cohort=cohort)
        if last is not None:
            record = record.with_(labels=last.labels, claims=last.claims, heads=last.heads)
        record = self.write(record)
        self.events.add("round-opened", round=number, sites=list(cohort))
        return record

    def reopen(self, record: Record) -> Record:
        """A failed round once more: receipts stay, failures are forgotten, the deadline begins anew."""
        record = self.write(record.with_(state="open", failures=(), elapsed_s=0.0, reason=""))
        (self.run.round(record.round) / "tickets.json").unlink(missing_ok=True)  # closed for good; new ones are issued
        self.events.add("round-opened", round=record.round, sites=list(record.cohort))
        return record

    # Open: ask, wait, check, until every site has answered or given up, or the time is over.

    def collect(self, record: Record) -> Record:
        """Wait for the cohort; then close the round for uploads and freeze the list of receipts."""
        start = time.monotonic() - record.elapsed_s
        self.asked = {site: _Asked() for site in record.cohort}
        self.next_port = 0.0
        closing = (self.run.round(record.round) / "tickets.json").exists()
        closing = closing and record.round not in tickets.open_rounds(self.run)  # stopped between closing and freezing
        while not closing:
            self.check_epoch()
            elapsed = time.monotonic() - start
            record = self.take_receipts(record.with_(elapsed_s=elapsed))
            if elapsed >= self.plan.limits.deadline_s or not self.pending(record):
                closing = True
                continue
            pause = min(LONGEST_S, 0.01 * elapsed)
            if time.monotonic() >= self.next_port:
                record = self.ask(record, self.plan.limits.deadline_s - elapsed)
                self.next_port = time.monotonic() + max(PORT_S if self.all_waiting(record) else POLL_S, pause)
            time.sleep(max(POLL_S, pause))
        record = self.write(record)
        tickets.close(self.run, record.round)
        return self.freeze(self.take_receipts(record))

    def pending(self, record: Record) -> list[str]:
        """Members of the cohort that owe an update and have not given up."""
        still, retries = members.members(self.run), self.plan.limits.retries
        return [
            site
            for site in record.cohort
            if site in still and site not in record.receipts and not record.gave_up(site, retries)
        ]

    def all_waiting(self, record: Record) -> bool:
        return all(self.asked[site].waiting for site in self.pending(record))

    def ask(self, record: Record, left: float) -> Record:
        """Take the replies in, then push to every pending site that is reachable and due."""
        now = time.monotonic()
        for answer in self.port.pull():
            if answer.site not in self.asked or answer.site in record.receipts:
                continue
            self.asked[answer.site].again(now)
            if answer.code and answer.code != LOST:
                record = self.refused(record, answer)
        reachable = self.port.sites()
        for site in self.pending(record):
            asked = self.asked[site]
            if site not in reachable:
                asked.away = True
                continue
            if asked.away and asked.waiting:  # whatever it had been told may be gone
                asked.waiting, asked.due = False, now
            asked.away = False
            if not asked.waiting and now >= asked.due:
                self.push(record, site, left)
        return record

    def push(self, record: Record, site: str, left: float) -> None:
        request = self.request(record, site, max(left, 1.0))
        ticket = tickets.issue(self.run, record.round, site, plan=record.plan, base=record.base)
        self.port.push(site, request, ticket, self.data)
        self.asked[site].waiting = True
        self.events.add("request-sent", round=record.round, site=site)

    def request(self, record: Record, site: str, deadline_s: float) -> Request:
        return Request(
            run=self.run_id,
            round=record.round,
            site=site,
            plan=record.plan,
            base=record.base,
            deadline_s=deadline_s,
            ledger=record.head_of(site),
        )

    def refused(self, record: Record, answer: Answer) -> Record:
        """Note that the site itself refuses, with where its ledger ends if it has signed that."""
        site = answer.site
        head = signed_head(self.run, self.request(record, site, 1.0), answer)
        if head is not None:
            record = record.seen(site, head)
        return self.failed_at(record, site, answer.code if answer.code in CODES else "internal")

    def failed_at(self, record: Record, site: str, code: str) -> Record:
        self.events.add("site-failed", round=record.round, site=site, code=code)
        return self.write(record.with_(failures=(*record.failures, Failure(site=site, code=code))))

    def take_receipts(self, record: Record) -> Record:
        """Check what has arrived, and forget what no longer holds: a revoked member, a renewed key."""
        held = {site: receipts.receipt(self.run, record.round, site) for site in record.cohort}
        lost = [site for site in record.receipts if held[site] is None]
        if lost:
            kept = {site: counted for site, counted in record.receipts.items() if site not in lost}
            record = self.write(record.with_(receipts=kept))
            for site in lost:
                self.asked[site] = _Asked()
        for site, receipt in held.items():
            if receipt is not None and site not in record.receipts:
                record = self.take(record, receipt)
        if time.monotonic() >= self.next_save:
            self.next_save = time.monotonic() + SAVE_S
            record = self.write(record)
        return record

    def take(self, record: Record, receipt: Receipt) -> Record:
        """Count `receipt`, or refuse it and have the site asked again."""
        site, claim = receipt.site, receipt.manifest.privacy
        if claim is not None:
            record = record.seen(site, claim.ledger)
        try:
            counted = self.checked(record, receipt)
        except RefusedError as error:
            tickets.void(self.run, site)
            receipts.drop(self.run, record.round, site)
            self.asked.setdefault(site, _Asked()).again(time.monotonic())
            return self.failed_at(record, site, error.code)
        record = self.write(record.counting(site, counted))
        self.events.add("receipt", round=record.round, site=site)
        return record

    def checked(self, record: Record, receipt: Receipt) -> Counted:
        """What counts of `receipt`.

        Raises:
            RefusedError: update-manifest, update-labels, update-digest, update-length or update-not-finite.
        """
        manifest = receipt.manifest
        manifest.check(self.request(record, receipt.site, 1.0))
        closing = self.closing(record.round)
        if manifest.steps != (0 if closing else self.plan.training.local_steps):
            raise RefusedError("update-manifest")
        if (manifest.privacy is not None) != (self.plan.privacy.mode == "patient"):
            raise RefusedError("update-manifest")  # without its claim nobody could say what protects the patients
        labels = manifest.labels
        known = all(0 <= row < len(label_set()) for row in labels) and labels == tuple(sorted(set(labels)))
        if not known or record.labels.get(receipt.site, labels) != labels:
            raise RefusedError("update-labels")
        found = inspect(receipt.path, NOTHING if closing else self.layout)
        if found.digest != manifest.update:
            raise RefusedError("update-digest")
        return Counted(
            update=found.digest,
            norm=found.norm,
            labels=labels,
            steps=manifest.steps,
            metrics={name: value for name, value in manifest.metrics.items() if name in self.plan.metrics},
            scores=self.scores(manifest),
            privacy=manifest.privacy,
            release=manifest.release,
            lock=manifest.lock,
        )

    def scores(self, manifest: Manifest) -> tuple[GroupScores, ...]:
        """The validation figures that count; none of a site whose figures contradict each other."""
        if "validation" not in self.plan.metrics:
            return ()
        reason = fault(manifest.scores, manifest.labels)
        if reason:
            self.events.add("scores-ignored", round=manifest.round, site=manifest.site, reason=reason)
        return () if reason else manifest.scores

    def freeze(self, record: Record) -> Record:
        """The list of receipts is final, if there are enough of them."""
        wanted = self.wanted(record.round)
        if len(record.receipts) >= wanted:
            return self.write(record.with_(state="frozen"))
        last = {each.site: each.code for each in record.failures}
        missing = [f"{site} ({last.get(site, 'no answer')})" for site in record.cohort if site not in record.receipts]
        reason = f"{len(record.receipts)} of {wanted} updates arrived; missing: {', '.join(missing)}"
        self.write(record.with_(state="failed", reason=reason))
        self.events.add("round-failed", round=record.round, reason=reason)
        raise StateError(
            f"round {record.round} failed: {reason}",
            step="help the sites that are missing, then start again: the updates that arrived are kept",
        )

    # Frozen: receipts to the next global weights. A repeat gives the same bytes, so a crash in between does no harm.

    def aggregate(self, record: Record) -> Record:
        if self.closing(record.round):
            return self.close(record, record.base)
        contributions = [self.contribution(record, site) for site in sorted(record.receipts)]
        limits = self.plan.limits
        flat = checkpoints.read_flat(self.run.weights_file(record.base), self.layout, record.base)
        advance(
            flat,
            mean_update(contributions, self.layout, max_share=limits.max_share, min_sites=limits.min_sites),
            self.layout,
            self.plan.strategy,
            frozen=frozen_rows(contributions, len(label_set()), limits.min_sites),
            before=self.state_path(record.round - 1) if record.round > 1 else None,
            after=self.state_path(record.round),
        )
        updates = {site: counted.update for site, counted in sorted(record.receipts.items())}
        facts = checkpoints.facts_of(self.plan, plan_digest=record.plan, round=record.round, updates=updates)
        facts |= statement.facts(record.claims)
        return self.close(record, checkpoints.write_round(self.run, record.round, flat, self.layout, facts))

    def close(self, record: Record, weights: str) -> Record:
        record = self.write(record.with_(state="closed", weights=weights, validation=self.validation(record)))
        self.events.add("round-closed", round=record.round, seconds=round(record.seconds, 1))
        return record

    def closing(self, number: int) -> bool:
        """Whether round `number` trains nothing: sites measure the final weights."""
        return number > self.plan.training.rounds

    def wanted(self, number: int) -> int:
        """How many updates a round needs; figures of the final weights are taken as they come."""
        limits = self.plan.limits
        return 0 if self.closing(number) else max(limits.quorum, limits.min_sites)

    def validation(self, record: Record) -> Validation | None:
        counted = record.receipts
        scores = {site: each.scores for site, each in counted.items()}
        return summed(scores, {site: each.labels for site, each in counted.items()}, self.plan.sites)

    def contribution(self, record: Record, site: str) -> Contribution:
        """What counts of `site`, after a second look at the bytes that were frozen."""
        counted = record.receipts[site]
        path = self.run.receipts(record.round) / f"{site}.safetensors"
        found = inspect(path, self.layout) if path.exists() else None
        if found is None or found.digest != counted.update:
            raise StateError(f"{path} is missing or not what was frozen", step="restore it from a backup")
        scale = clip_scale(found.norm, self.plan.limits.max_update_norm)
        if scale < 1:
            log.warning("round %d: the update of %s has norm %.3g and is clipped", record.round, site, found.norm)
        return Contribution(site, path, self.plan.sites[site], frozenset(counted.labels), scale)

    def state_path(self, number: int) -> Path:
        """The strategy's state after round `number`."""
        return self.run.state / f"strategy-{number:04d}.safetensors"

    # Closed: what is no longer needed goes. Done again at the next start, should a crash come between.

    def tidy(self, record: Record) -> None:
        if self.plan.retention.receipts == "delete":
            for site in record.cohort:
                receipts.drop(self.run, record.round, site)
        trained = min(record.round, self.plan.training.rounds)
        checkpoints.prune(self.run, trained, keep=self.plan.retention.checkpoints)
        for path in self.run.state.glob("strategy-*.safetensors"):
            if path != self.state_path(trained):
                path.unlink()
