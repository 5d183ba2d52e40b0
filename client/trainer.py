"""The side of the airlock that decides: checks a request against the site's own rules, trains, gates, signs, publishes.

No transport here: `rin.client.airlock` serves a `Trainer` on a Unix socket.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rin.client import policy
from rin.client.home import Home
from rin.client.jobs import Jobs, Stored, put_out, take_in
from rin.client.ledger import site_ledger
from rin.client.norms import LocalNorms
from rin.client.private import Names, private_steps, signed_refusal
from rin.client.site import Site, read_site
from rin.client.training import Work, check, device_answers, images_of, limit_memory, local_steps, release_memory
from rin.common import egress, keys, statement
from rin.common.errors import DEVICE_STEPS, RefusedError, RinError, device_fault
from rin.common.events import Events
from rin.common.files import write_atomic, write_json
from rin.common.labels import label_set_digest
from rin.common.layout import NOTHING, Layout, file_digest
from rin.common.plan import PROTOCOL, MetricName, Plan
from rin.common.wire import Claim, Manifest, Request, lock_digest

if TYPE_CHECKING:
    from rin.common.backbones import Network

log = logging.getLogger(__name__)

FULL: Final = (errno.ENOSPC, errno.EDQUOT)
STATUS_EVERY: Final = 1.0  # seconds between two writes of vault/status.json
EVENT_EVERY: Final = 10.0  # seconds between two lines of vault/log/events.jsonl
# The coordinator clips at the plan's norm. What it would have to clip this hard is a fault and stays here.
NORM_SLACK: Final = 10.0


@dataclass(frozen=True, slots=True)
class State:
    """What Hello answers: this release and this site; nothing about data."""

    protocol: int
    release: str
    site: str
    label_set: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Optimizer steps done of all in this round."""

    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Done:
    """The update of `request` (its id) lies in the outbox; `update` is the digest of its tensor bytes."""

    request: str
    update: str


class Trainer:
    """One home's trainer. Not for several threads at once: the airlock gives it one job after another.

    Attributes:
        lost: the device failed in a way that only a new process gets over.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self.jobs = Jobs(home)
        self.events = Events(home.vault_log / "events.jsonl")
        self.lost = False
        self._warm: tuple[str, Network, Layout] | None = None
        for folder in (home.jobs, home.vault_log):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        home.outbox.mkdir(parents=True, exist_ok=True)

    def hello(self) -> State:
        """Who is here.

        Raises:
            ConfigError: site.toml is missing or wrong.
        """
        return State(PROTOCOL, metadata.version("rin"), read_site(self.home).site, label_set_digest())

    def train(
        self, request: Request, plan: bytes, progress: Callable[[Progress], None], cancelled: Callable[[], str]
    ) -> Done:
        """Train one round and publish the update; the same request again is answered from the stored one.

        Args:
            plan: the plan file's exact bytes.
            progress: called after each optimizer step.
            cancelled: asked before each; a code (cancelled, deadline) ends the work.

        Raises:
            RefusedError: with one of `CODES`; its text is for this site only.
        """
        self.show(state="starting", round=request.round)
        with self._refusals(request, plan):
            done = self._train(request, plan, progress, cancelled)
            self.events.add("update-ready", round=request.round)
        self.show(state="idle", round=request.round, code="")
        return done

    def _train(
        self, request: Request, data: bytes, progress: Callable[[Progress], None], cancelled: Callable[[], str]
    ) -> Done:
        site, plan = read_site(self.home), policy.open_plan(data, request.plan)
        if request.site != site.site or request.round > plan.last_round:
            raise RefusedError("bad-request", "the request is for another site, or for a round beyond the plan")
        policy.check_start(plan, request.round, request.base)
        watch = _Watch(self, request.round, plan, progress).step
        images, folder = images_of(self.home, site), self.jobs.folder(request)
        work = Work(self.home, plan, site, images, request.round, folder, watch, cancelled)
        accepted = accepted_plans(self.home)
        policy.refuse(policy.check(plan, request.plan, site, accepted, patients=images.n_patients))
        if work.private and request.ledger is not None:
            site_ledger(self.home).require(request.ledger)
        stored = self.jobs.stored(request)
        if stored is None:
            if images.n_images == 0 and not work.private:  # a private site does not say whether anybody is there
                raise RefusedError("no-data")
            self.jobs.admit(request, max_rounds=site.policy.max_rounds, trains=work.trains)
            self.jobs.prune(request)
            stored = self._work(request, work)
            self.jobs.store(request, stored)
        return self._publish(request, site, stored)

    def _work(self, request: Request, work: Work) -> Stored:
        """Global weights in, local steps, update through the gate and onto the disk of the vault."""
        from rin.client.validation import measure
        from rin.common import weights

        plan, site = work.plan, work.site
        limit_memory(site)
        network, layout = self._network(request.plan, plan)
        base, update = self.jobs.base(request), self.jobs.update(request)
        self._room_for(2 * layout.file_bytes, site)
        wanted = partial(check, work.cancelled)  # whether anybody still wants the work
        take_in(self.home.inbox, request.base, base, layout, between=wanted)
        weights.read_into(network, base, layout)
        norms = LocalNorms(self.home.norms / request.run) if plan.model.local_norms else None
        if norms is not None:
            norms.bring(network, request.round)
        wanted()
        scores = measure(self.home, network, plan, site, work.cancelled)  # of the weights that came, before training
        labels = site.labels.rows()
        if not work.trains:  # the closing round is answered by an update without tensors
            write_atomic(update, NOTHING.header())
            facts = egress.UpdateFacts(file_digest(update), norm=0.0)
            return Stored.of(request, facts, steps=0, labels=labels, scores=scores)
        metrics, claim = self._local_steps(network, request, work)
        if norms is not None:
            norms.keep(network, request.round)
        weights.write_update(update, network, base, layout, between=wanted)
        wanted()
        facts = egress.check_update(update, layout, max_norm=NORM_SLACK * plan.limits.max_update_norm)
        metrics = egress.pass_metrics(metrics, policy.allowed_metrics(plan, site))
        steps = plan.training.local_steps
        return Stored.of(request, facts, steps=steps, labels=labels, metrics=metrics, scores=scores, privacy=claim)

    def _local_steps(
        self, network: Network, request: Request, work: Work
    ) -> tuple[dict[MetricName, float], Claim | None]:
        """Train; figures of the batches where the plan is not private, a claim where it is."""
        if work.private:
            return {}, private_steps(network, work, Names(request.run, request.plan, request.id))
        return local_steps(network, work, name=request.id).metrics, None

    def _network(self, digest: str, plan: Plan) -> tuple[Network, Layout]:
        """The plan's network; kept between rounds, for every value in it is overwritten by the global weights."""
        from rin.common import backbones, weights

        if self._warm is None or self._warm[0] != digest:
            self._warm = None  # before the next one is built: two may not fit into memory
            network = backbones.build(plan.model)
            self._warm = (digest, network, weights.layout_of(network))
        return self._warm[1], self._warm[2]

    def _publish(self, request: Request, site: Site, stored: Stored) -> Done:
        """Sign the manifest and put both into the outbox; the egress log is written first."""
        manifest = Manifest(
            run=request.run,
            round=request.round,
            site=request.site,
            plan=request.plan,
            base=request.base,
            request=request.id,
            update=stored.update,
            steps=stored.steps,
            labels=stored.labels,
            metrics=stored.metrics,
            scores=stored.scores,
            privacy=stored.privacy,
            release=metadata.version("rin"),
            lock=lock_digest(),
        )
        signature = keys.sign(keys.load_signing_key(self.home.keys / "signing.key"), manifest.signed_bytes())
        paper, outbox = manifest.to_bytes(), self.home.outbox
        self._room_for(self.jobs.update(request).stat().st_size, site)
        egress.record(
            self.home.egress_log,
            what="update",
            digest=stored.update,
            to="coordinator",
            facts={
                "manifest": hashlib.sha256(paper).hexdigest(),
                "run": request.run,
                "round": request.round,
                "plan": request.plan,
                "bytes": self.jobs.update(request).stat().st_size,
                "norm": stored.norm,
                "metrics": dict(stored.metrics),
                "scores": [group.model_dump(mode="json") for group in stored.scores],
                "privacy": stored.privacy.model_dump(mode="json") if stored.privacy else None,
                "statement": statement.of_update(stored.privacy) if stored.steps else None,
            },
        )
        put_out(self.jobs.update(request), outbox, f"{request.id}.safetensors", stored.update)
        write_json(
            outbox / f"{request.id}.json",
            {"manifest": keys.encode(paper), "signature": keys.encode(signature)},
            mode=0o440,
        )
        return Done(request.id, stored.update)

    def _room_for(self, size: int, site: Site) -> None:
        if shutil.disk_usage(self.home.jobs).free < size + site.device.disk_reserve_gib * 2**30:
            raise RefusedError("disk-full", "less than device.disk-reserve-gib would be left on the disk")

    @contextlib.contextmanager
    def _refusals(self, request: Request, plan: bytes) -> Iterator[None]:
        """Turn whatever goes wrong into a refusal with one of our codes, and write down what the operator needs."""
        try:
            yield
        except Exception as error:  # the edge of a job: a code leaves, the rest stays here
            refusal = refusal_of(error)
            if refusal.code in ("memory", "device"):
                self._warm = None
                self.lost = not device_answers()
                if not self.lost:
                    release_memory(error)
            if refusal.code == "internal":
                log.error("round %d failed", request.round, exc_info=error)
            self.show(
                state="idle", round=request.round, code=refusal.code, text=refusal.message, step_next=refusal.step
            )
            self.events.add("request-refused", round=request.round, code=refusal.code)  # whoever sees it reads the text
            if _is_private(plan, request.plan):
                refusal.note = signed_refusal(self.home, request, refusal.code)
            raise refusal from None

    def show(self, **fields: Any) -> None:
        """What `rin-client status` shows; a full disk must not end a round that fits."""
        with contextlib.suppress(OSError):
            now = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(self.home.root / "vault" / "status.json", {"time": now, **fields}, mode=0o600)


class _Watch:
    """Passes on how far a round is, and writes it down now and then."""

    def __init__(self, trainer: Trainer, round: int, plan: Plan, progress: Callable[[Progress], None]) -> None:
        self._trainer, self._round, self._progress = trainer, round, progress
        private = plan.privacy
        # How many patients a private step has drawn nobody is told.
        drawn, batch = private.patients * private.images, plan.training.batch_size
        self._batch_size = drawn if private.mode == "patient" else batch
        self._began = self._shown = self._logged = time.monotonic()
        self._first = -1  # steps that were done when this watch saw one; an interrupted round does not begin at 0

    def step(self, step: int, steps: int) -> None:
        self._progress(Progress(step, steps))
        now = time.monotonic()
        if self._first < 0:
            self._first, self._began = step, now
        if now - self._shown >= STATUS_EVERY:
            self._shown = now
            speed = round((step - self._first) * self._batch_size / max(now - self._began, 1e-3), 1)
            self._trainer.show(state="training", round=self._round, step=step, steps=steps, images_per_s=speed)
        if now - self._logged >= EVENT_EVERY:
            self._logged = now
            self._trainer.events.add("training", round=self._round, step=step, steps=steps)


def refusal_of(error: BaseException) -> RefusedError:
    """`error` as a refusal with the code that fits."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, RinError):
        return RefusedError(error.code, error.message, step=error.step)
    if isinstance(error, OSError) and error.errno in FULL:
        return RefusedError("disk-full", step="free some space; the coordinator asks again")
    if code := device_fault(error):
        return RefusedError(code, step=DEVICE_STEPS[code])
    return RefusedError("internal", step="look into vault/log/trainer.jsonl")


def _is_private(data: bytes, digest: str) -> bool:
    with contextlib.suppress(RefusedError):
        return policy.open_plan(data, digest).privacy.mode == "patient"
    return False


def accepted_plans(home: Home) -> frozenset[str]:
    """Digests of the plans that a person at the site accepted; a file counts only under its own digest."""
    return frozenset(path.stem for path in home.accepted.glob("*.toml") if _digest(path) == path.stem)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def warm_up() -> None:
    """Import what a first round needs, so that it does not wait 10 s for it."""
    from rin.client import data
    from rin.common import backbones, fit, weights

    log.debug("warm: %s", [module.__name__ for module in (data, backbones, fit, weights)])
